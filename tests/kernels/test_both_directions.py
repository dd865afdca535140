"""Both directions of a layer at once: bit for bit what one after the other gives, and clear refusals."""

import itertools

import passes
import pytest
import torch
from comparison import HAS_NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from variants import random_parameters

import throughtime
import throughtime.operator  # noqa: F401 which brings torch.ops.throughtime
from throughtime.backend import native as backend
from throughtime.cells import CELLS, find
from throughtime.kernels import layout
from throughtime.request import split

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

INPUTS = 5
FORMS = ("plain", "lengths", "reset", "packed")


class Request:
    """A layer's arguments, with twice as many of those that each direction has."""

    def __init__(self, cell: str, steps: int, batch: int, hidden: int, dtype: torch.dtype, form: str, project: bool):
        projection = (hidden + 1) // 2 if project and cell.startswith("lstm") and hidden > 1 else 0
        width, states = projection or hidden, len(find(cell).spec.states)
        self.cell, self.batch_sizes = cell, None
        draw = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
        lengths = torch.randint(0, steps + 1, (batch,))
        self.lengths = lengths if form == "lengths" else None
        self.reset = torch.rand(steps, batch) < 0.3 if form == "reset" else None
        places: tuple[int, ...] = (steps, batch)
        if form == "packed":
            packed = pack_padded_sequence(draw(steps, batch, 1), lengths.clamp(min=1), enforce_sorted=False)
            self.batch_sizes, places = packed.batch_sizes, (len(packed.data),)
        self.input = draw(*places, INPUTS)
        self.parameters = [
            p.to(dtype) for _ in range(2) for p in random_parameters(cell, INPUTS, hidden, projection=projection)
        ]
        self.initial = [draw(batch, columns) for columns in (width, hidden)[:states]]
        self.initial += [draw(*s.shape) for s in self.initial]
        self.grad_output, self.grad_final = draw(*places, 2 * width), [draw(*s.shape) for s in self.initial]

    def run(self, at_once: bool, recompute_every: int = 0) -> list[Tensor]:
        """Output, final state, gradients of input, initial state and parameters."""
        more = {"batch_sizes": self.batch_sizes, "recompute_every": recompute_every}
        if at_once:
            results = [self._pass(self.initial, self.parameters, self.grad_output, self.grad_final, False, more, True)]
        else:
            lists = (split(tensors, 2) for tensors in (self.initial, self.parameters, self.grad_final))
            initial, parameters, final = lists
            grads = self.grad_output.chunk(2, -1)
            each = zip(initial, parameters, grads, final, (False, True), strict=True)
            results = [self._pass(*given, more, False) for given in each]
        outputs, finals, inputs, states, weights = zip(*results, strict=True)
        chain = itertools.chain.from_iterable
        grad_input = inputs[0] if at_once else inputs[0] + inputs[1]
        return [torch.cat(outputs, -1), *chain(finals), grad_input, *chain(states), *chain(weights)]

    def _pass(
        self,
        initial: list[Tensor],
        parameters: list[Tensor],
        grad_output: Tensor,
        grad_final: list[Tensor],
        reverse: bool,
        more: dict,
        bidirectional: bool,
    ) -> tuple:
        given = (self.cell, self.input, initial, parameters, self.lengths, self.reset, reverse)
        more = more | {"bidirectional": bidirectional}
        output, final, saved = passes.forward(*given, **more)
        gradient = passes.backward(given, grad_output, grad_final, output, saved, **more)
        return output, final, gradient.input, gradient.initial, gradient.parameters


def assert_same(request: Request, recompute_every: int = 0) -> None:
    both = zip(request.run(True, recompute_every), request.run(False), strict=True)
    # A variant's biases and gains are summed by each group of rows, and of two directions at once each has fewer threads.
    sums = len(request.parameters) if "+" in request.cell and torch.get_num_threads() > 1 else 0
    last = 2 + 2 * len(request.initial)
    for index, (a, e) in enumerate(both):
        if index >= last and sums:
            torch.testing.assert_close(a, e)
        else:
            assert torch.equal(a, e), index


VARIANTS = [f"{cell}+layer_norm" for cell in CELLS] + ["lstm+peepholes", "lstm+coupled+peepholes+layer_norm"]


@given(
    cell=st.sampled_from([*CELLS, *VARIANTS]),
    batch=st.sampled_from([1, 2, 4, 9, 40]),
    hidden=st.sampled_from([1, 7, 33, 70]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    form=st.sampled_from(FORMS),
    project=st.booleans(),
    threads=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_at_once_equals_one_after_the_other(cell, batch, hidden, dtype, form, project, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    try:
        assert_same(Request(cell, 9, batch, hidden, dtype, form, project))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", [*CELLS, "gru+layer_norm", "lstm+peepholes+layer_norm"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute_every", [0, 1, 4])
def test_stretches_and_segments_of_both_are_met_in_their_order(monkeypatch, cell, form, recompute_every):
    monkeypatch.setattr(layout, "_STRETCH", 2000)  # of a few steps each, as many as not to come out even
    assert_same(Request(cell, 11, 5, 7, torch.float32, form, False), recompute_every)


def arguments() -> dict:
    request = Request("lstm", 4, 3, 5, torch.float32, "plain", False)
    return {"input": request.input, "initial": request.initial, "parameters": request.parameters, "reverse": False}


SPOILT = {
    "reverse": ({"reverse": True}, "reverse is true beside bidirectional"),
    "states of one": (lambda a: {"initial": a["initial"][:2]}, r"there are 1 state tensors; expected h_0, c_0"),
    "odd states": (lambda a: {"initial": a["initial"][:3]}, "there are 3 state tensors; expected as many"),
    "odd parameters": (lambda a: {"parameters": a["parameters"][:7]}, "there are 7 parameters; expected as many"),
    "another width": (
        lambda a: {"parameters": [*a["parameters"][:5], torch.zeros(20, 6), *a["parameters"][6:]]},
        r"parameters\[5\] of the reverse pass is \(20, 6\)",
    ),
    "another dtype": (
        lambda a: {"initial": [*a["initial"][:3], a["initial"][3].double()]},
        r"state tensors\[3\] of the reverse pass is .*float64",
    ),
    "none": (lambda a: {"parameters": [*a["parameters"][:7], None]}, r"parameters\[3\] is a NoneType"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_directions_that_differ_are_refused(case):
    given, (spoilt, message) = arguments(), SPOILT[case]
    passes.forward("lstm", **given, bidirectional=True)
    given |= spoilt(given) if callable(spoilt) else spoilt
    with pytest.raises((ValueError, TypeError), match=message):
        passes.forward("lstm", **given, bidirectional=True)


def test_a_backward_pass_refuses_what_belongs_to_one_direction():
    request = Request("lstm", 4, 3, 5, torch.float32, "plain", False)
    given = ("lstm", request.input, request.initial, request.parameters)
    output, _, saved = passes.forward(*given, bidirectional=True)
    right = {"output": output, "saved": saved, "grad_output": request.grad_output, "grad_final": request.grad_final}

    def run(**spoilt: object) -> None:
        it = right | spoilt
        grads = (it["grad_output"], it["grad_final"])
        passes.backward(given, *grads, it["output"], it["saved"], bidirectional=True)

    run()
    for name, wrong in (
        ("output", output[..., :5]),
        ("grad_output", request.grad_output[..., :5]),
        ("saved", saved[:2]),
        ("grad_final", request.grad_final[:2]),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            run(**{name: wrong})


@pytest.mark.parametrize(("cell", "backend"), [("lstm", "reference"), ("lstm+recurrent_dropout", "native")])
def test_others_run_one_way_at_a_time(cell, backend):
    parameters = [p for _ in range(2) for p in random_parameters(cell, INPUTS, 5)]
    masks = [torch.ones(3, 5).double()] * cell.endswith("dropout")
    given = (torch.zeros(4, 3, INPUTS).double(), [torch.zeros(3, 5).double()] * 4, parameters, None, None, masks)
    with pytest.raises(NotImplementedError, match="one way at a time"):
        torch.ops.throughtime.recurrence(*given, cell, False, True, backend, None, 0, True)


def operator_arguments(
    cell: str,
    form: str,
    hidden: int = 4,
    recompute_every: int = 0,
    tokens: bool = False,
    steps: int = 4,
    batch: int = 3,
) -> tuple:
    request = Request(cell, steps, batch, hidden, torch.float64, form, False)
    x = request.input.requires_grad_() if not tokens else torch.randint(INPUTS, request.input.shape[:-1])
    initial, parameters = ([t.requires_grad_() for t in ts] for ts in (request.initial, request.parameters))
    rest = (request.lengths, request.reset, [], cell, False, True, "native", request.batch_sizes, recompute_every, True)
    return x, initial, parameters, *rest


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("form", "recompute_every", "tokens"), [("lengths", 2, True), ("packed", 0, False), ("reset", 2, False)]
)
def test_the_operator_keeps_torchs_rules(cell, form, recompute_every, tokens):
    given = operator_arguments(cell, form, 4, recompute_every, tokens)
    torch.library.opcheck(torch.ops.throughtime.recurrence.default, given)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_derivatives_of_first_and_second_order(cell, form):
    x, state, parameters, *rest = operator_arguments(cell, form, 2, steps=3, batch=2)

    def run(x: Tensor, *tensors: Tensor):
        initial, weights = list(tensors[: len(state)]), list(tensors[len(state) :])
        output, final, _ = torch.ops.throughtime.recurrence(x, initial, weights, *rest)
        return output, *final

    assert torch.autograd.gradcheck(run, (x, *state, *parameters))
    if cell != "rnn_relu":
        assert torch.autograd.gradgradcheck(run, (x, *state, *parameters))


@pytest.mark.parametrize(("kind", "options"), [("WholePlan", {}), ("Plan", {"lengths": torch.tensor([5, 2])})])
def test_a_layer_runs_both_at_once(kind, options, monkeypatch):
    directions, plan = [], getattr(backend, kind)
    monkeypatch.setattr(backend, kind, lambda request: directions.append(len(request.directions)) or plan(request))
    throughtime.GRU(3, 4, num_layers=2, bidirectional=True)(torch.zeros(5, 2, 3), **options)
    assert directions == [2, 2]
