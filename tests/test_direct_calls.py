"""Calls that spare torch's dispatcher: the same to the bit, and not taken where somebody watches."""

import subprocess
import sys
import weakref
from typing import ClassVar

import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import throughtime
from throughtime.backend import native as backend

LAYERS = {"rnn": throughtime.RNN, "lstm": throughtime.LSTM, "gru": throughtime.GRU}
FORWARD, BACKWARD = "throughtime.recurrence.default", "throughtime.recurrence_backward.default"

pytestmark = pytest.mark.skipif(
    not HAS_NATIVE, reason="the native kernels aren't built"
)  # only they are called directly


class Watch(TorchDispatchMode):
    """Notes the operators that torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Case:
    """A layer and what it is called with; `run` returns all that comes of it."""

    def __init__(self, layer: str = "lstm", lengths: bool = False, **options) -> None:
        self.layer = LAYERS[layer](3, 4, **options)
        self.x = torch.randn(6, 3, 3, requires_grad=True)
        self.lengths = torch.tensor([6, 0, 4]) if lengths else None

    def forward(self) -> tuple[Tensor, Tensor]:
        output, final = self.layer(self.x, lengths=self.lengths)
        return output, final if isinstance(final, Tensor) else final[1]

    def gradients(self, output: Tensor, final: Tensor, **options) -> list[Tensor]:
        wanted = [self.x, *self.layer.parameters()]
        return list(torch.autograd.grad(output.square().sum() + final.sum(), wanted, **options))

    def run(self) -> list[Tensor]:
        torch.manual_seed(0)  # of zoneout's masks
        output, final = self.forward()
        return [output, final, *self.gradients(output, final)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def plans(monkeypatch) -> list:
    """The plans made from now on."""
    made = []

    for kind in ("Plan", "WholePlan"):
        plan = getattr(backend, kind)
        monkeypatch.setattr(backend, kind, lambda request, plan=plan: made.append(made) or plan(request))
    return made


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"backend": "reference"}, {"zoneout": 0.3}]
)
def test_a_watched_call_is_the_same_to_the_bit(layer, lengths, options):
    case = Case(layer, lengths, **options)
    with Watch() as watch:
        watched = case.run()
    assert FORWARD in watch.seen
    assert BACKWARD in watch.seen
    assert same(case.run(), watched)


def test_a_watched_call_without_gradients_is_seen_too():
    case = Case()
    with torch.no_grad(), Watch() as watch:
        case.forward()
    assert FORWARD in watch.seen


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.12 and older, whenever it profiles
def test_a_profiler_sees_the_operators():
    case = Case()
    with torch.profiler.profile() as profile:
        case.run()
    names = {event.key for event in profile.key_averages()}
    assert {"throughtime::recurrence", "throughtime::recurrence_backward"} <= names


def test_a_tensor_of_another_class_sees_the_operator():
    seen = []

    class Seeing(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    case = Case()
    output, _ = case.layer(case.x.detach().as_subclass(Seeing))
    assert FORWARD in seen
    assert torch.equal(output.as_subclass(Tensor), case.forward()[0])


def test_watching_only_the_way_back_works():
    case = Case()
    expected = case.run()
    output, final = case.forward()
    with Watch() as watch:
        gradients = case.gradients(output, final)
    assert BACKWARD in watch.seen
    assert same(expected[2:], gradients)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_layer_holds_the_operator():
    case = Case()
    with torch.no_grad():
        traced = torch.jit.trace(case.layer, (case.x,), check_trace=False)
        assert "throughtime::recurrence" in str(traced.inlined_graph)
        other = torch.randn(6, 3, 3)
        assert torch.equal(traced(other)[0], case.layer(other)[0])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
@pytest.mark.parametrize("lengths", [False, True])
def test_both_passes_share_a_plan_and_a_third_has_its_own(plans, options, lengths):
    case = Case(lengths=lengths, **options)
    output, final = case.forward()
    first = case.gradients(output, final, retain_graph=True)
    assert len(plans) == 1
    assert same(first, case.gradients(output, final))
    assert len(plans) == 2


@pytest.mark.parametrize(("lengths", "made"), [(True, 3), (False, 2)])  # without, a plan says nothing of memory
def test_a_plan_is_made_anew_for_other_memory(plans, lengths, made):
    case = Case(lengths=lengths)
    expected = case.run()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        assert same(expected, case.run())
    assert len(plans) == made


@pytest.mark.parametrize("lengths", [False, True])
def test_a_plan_is_made_anew_for_other_threads(plans, lengths):
    case, threads = Case(lengths=lengths), torch.get_num_threads()
    output, final = case.forward()
    try:
        torch.set_num_threads(threads + 1)
        case.gradients(output, final)
    finally:
        torch.set_num_threads(threads)
    assert len(plans) == 2


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_a_parameter_of_another_size_since_is_refused(name):
    case = Case()
    output, final = case.forward()
    parameter = getattr(case.layer, name)
    parameter.data = torch.randn(*(2 * size for size in parameter.shape))
    with pytest.raises((ValueError, RuntimeError), match=r"expected|shape"):
        case.gradients(output, final)


def test_a_parameter_that_was_written_to_since_is_refused():
    case = Case()
    output, final = case.forward()
    with torch.no_grad():
        case.layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.gradients(output, final)


@pytest.mark.parametrize("lengths", [False, True])
def test_nothing_is_kept_alive_that_autograd_has_let_go_of(lengths):
    case = Case(lengths=lengths)
    case.x = torch.randn(6, 3, 3)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda tensor: tensor):
        output, _ = case.forward()
    x, lengths = weakref.ref(case.x), None if case.lengths is None else weakref.ref(case.lengths)
    case.x = None
    assert x() is None
    output.sum().backward()
    case.lengths = None
    assert lengths is None or lengths() is None


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_final_state_is_the_callers_own(layer, num_layers):
    _, final = LAYERS[layer](3, 4, num_layers)(torch.randn(5, 2, 3))
    for tensor in final if isinstance(final, tuple) else (final,):
        assert not tensor._is_view()
        tensor.detach_().zero_()


def test_checkpointing_changes_no_bit():
    case = Case()
    expected = case.run()
    output, (_, final) = torch.utils.checkpoint.checkpoint(case.layer, case.x, use_reentrant=False)
    (output.square().sum() + final.sum()).backward()
    assert same(expected[2:], [case.x.grad, *(p.grad for p in case.layer.parameters())])


def test_a_negative_distance_set_later_is_refused():
    case = Case()
    case.layer.recompute_every = -5
    with pytest.raises(ValueError, match="recompute_every = -5; expected a number of steps"):
        case.forward()


@pytest.mark.parametrize("id", [-1, 10**6])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 0, 3])])
def test_token_ids_overwritten_behind_autograds_back_are_refused(id, lengths):
    ids = torch.zeros(5, 3, dtype=torch.int64)
    output, _ = throughtime.LSTM(3, 4)(ids, lengths=lengths)
    ids.numpy()[0, 0] = id
    with pytest.raises((IndexError, RuntimeError), match=r"token id|[Cc]lass values"):
        output.sum().backward()


def test_a_function_mode_sees_the_operator():
    class Watch(TorchFunctionMode):
        seen: ClassVar = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        Case().forward()
    assert FORWARD in watch.seen


def test_a_graph_made_before_dispatch_holds_the_operator():
    case = Case()
    with torch.no_grad():
        graph = make_fx(lambda x: case.layer(x)[0], pre_dispatch=True)(case.x.detach())
        assert FORWARD in graph.code
        other = torch.randn(6, 3, 3)
        assert torch.equal(graph(other), case.layer(other)[0])


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.1}, {"reset_after": False}, {"bidirectional": True}])
@pytest.mark.parametrize("tokens", [False, True])
def test_shapes_are_told_without_values(options, tokens):
    layer = throughtime.GRU(9, 4, device="meta", **options)
    x = torch.zeros(5, 2, dtype=torch.int64, device="meta") if tokens else torch.zeros(5, 2, 9, device="meta")
    output, h = layer(x)
    ways = 2 if "bidirectional" in options else 1
    assert (output.shape, h.shape) == ((5, 2, 4 * ways), (ways, 2, 4))


def test_a_graph_that_lives_to_the_end_leaves_no_word():
    code = "import torch, throughtime; output, _ = throughtime.LSTM(3, 4)(torch.randn(5, 2, 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
