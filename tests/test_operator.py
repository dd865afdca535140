"""The operator's rules: derivatives of first and second order, fake tensors, compilation, export."""

import importlib
import shutil

import pytest
import torch
from comparison import BACKENDS, HAS_NATIVE
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from variants import mask_names, random_masks, random_parameters

import throughtime
from throughtime.backend import native, reference
from throughtime.cells import CELLS, Parameters, find
from throughtime.kernels import layout
from throughtime.request import Request
from throughtime.stack import choose_backend

LAYERS = {
    "rnn": lambda **k: throughtime.RNN(3, 4, **k),
    "lstm": lambda **k: throughtime.LSTM(3, 4, **k),
    "gru": lambda **k: throughtime.GRU(3, 4, **k),
    "gru_reset_before": lambda **k: throughtime.GRU(3, 4, reset_after=False, **k),
    "mgu": lambda **k: throughtime.MGU(3, 4, **k),
}


def arguments(
    name: str,
    backend: str,
    requires_grad: bool = True,
    ragged: bool = True,
    hidden: int = 4,
    tokens: bool = False,
    steps: int = 5,
) -> tuple:
    cell = CELLS[name]
    rows = cell.spec.gates * hidden
    shapes = [(rows, 3), (rows, hidden), (rows,), (rows,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=requires_grad) for s in shapes]
    x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=requires_grad)
    x = torch.randint(0, 3, (steps, 2)) if tokens else x
    state = [
        torch.randn(2, hidden, dtype=torch.float64, requires_grad=requires_grad) for _ in range(len(cell.spec.states))
    ]
    lengths = torch.tensor([steps, steps - 2]) if ragged else None
    reset = torch.rand(steps, 2) < 0.3 if ragged else None
    return x, state, tensors, lengths, reset, [], name, False, True, backend


OPERATOR_BACKENDS = [name for name in BACKENDS if name != "torch"]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_the_operator_keeps_torchs_rules(name, ragged, tokens, backend):
    """Schema, autograd registration, fake tensors, and AOT dispatch with symbolic shapes."""
    given = arguments(name, backend, ragged=ragged, tokens=tokens)
    torch.library.opcheck(torch.ops.throughtime.recurrence.default, given)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_derivatives_of_first_and_second_order(name, tokens, backend):
    x, state, parameters, lengths, reset, *rest = arguments(name, backend, hidden=2, tokens=tokens, steps=3)
    if tokens:  # as an embedding gives it: a transposed view
        parameters[0] = parameters[0].detach().t().contiguous().t().requires_grad_()

    def run(*tensors: Tensor):
        input, *tensors = (x, *tensors) if tokens else tensors
        initial, weights = list(tensors[: len(state)]), list(tensors[len(state) :])
        output, final, _ = torch.ops.throughtime.recurrence(input, initial, weights, lengths, reset, *rest)
        return output, *final

    leaves = (*state, *parameters) if tokens else (x, *state, *parameters)
    assert torch.autograd.gradcheck(run, leaves)
    if name != "rnn_relu":  # whose second derivative has no meaning at the kink that finite differences step over
        assert torch.autograd.gradgradcheck(run, leaves)


def test_nothing_is_saved_when_nothing_will_be_asked():
    *given, _, backend = arguments("lstm", "reference", requires_grad=False)
    saved = torch.ops.throughtime.recurrence(*given, False, backend)[2]
    assert saved == []


class _Zeros(TorchDispatchMode):
    """Notes how many zeros each call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "zeros" in str(func):
            self.made.append(result.numel())
        return result


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_no_gradient_is_made_up_for_what_is_kept(backend):
    layer = throughtime.LSTM(3, 4, backend=backend)
    output, _ = layer(torch.randn(50, 8, 3))
    with _Zeros() as zeros:
        output.sum().backward()
    assert max(zeros.made) < 50 * 8 * 4  # kept: (T · B, 4 H) and (T · B, H)


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_gradients_where_only_the_final_state_or_only_the_output_is_used(backend):
    layer = throughtime.LSTM(3, 4, backend=backend).double()
    x, weight = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    output, (h, c) = layer(x)
    results = []
    for loss in ((output * weight).sum(), h.sum(), (c * c).sum()):
        layer.zero_grad()
        loss.backward(retain_graph=True)
        results.append([p.grad.clone() for p in layer.parameters()])
    layer.zero_grad()
    ((output * weight).sum() + h.sum() + (c * c).sum()).backward()
    for p, *parts in zip(layer.parameters(), *results, strict=True):
        torch.testing.assert_close(p.grad, sum(parts))


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()  # so that what other tests compiled doesn't count
    layer = LAYERS[name](num_layers=2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 3)
    options = {"lengths": torch.tensor([6, 0, 2]), "reset": torch.rand(6, 3) < 0.3}
    torch.testing.assert_close(compiled(x, **options)[0], layer(x, **options)[0])
    layer(x)[0].sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled(x)[0].sum().backward()
    for p, e in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}])
def test_compiled_lengths_are_the_kernels_business(monkeypatch, name, options):
    """What is saved has the same size whatever they are, so that a graph can hold it: every bit is that of an eager call."""
    torch.compiler.reset()
    layer = LAYERS[name](num_layers=2, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 3)
    monkeypatch.setattr(reference, "forward", None)  # the equations aren't asked
    for lengths in ([6, 0, 2], [1, 5, 3], [6, 6, 6], [0, 0, 0]):
        results = []
        for module in (compiled, layer):
            output, _ = module(x, lengths=torch.tensor(lengths))
            results.append([output, *torch.autograd.grad(output.square().sum(), [*layer.parameters()])])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", LAYERS)
def test_exports_with_a_dynamic_number_of_steps(name):
    layer = LAYERS[name]()
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(layer, (torch.randn(6, 3, 3),), dynamic_shapes=({0: steps},))
    x = torch.randn(11, 3, 3)
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("embedded", [False, True])
def test_token_ids_compile_and_export(name, embedded):
    torch.compiler.reset()  # so that what other tests compiled doesn't count
    layer = LAYERS[name]()
    embedding = torch.randn(6, 3, requires_grad=True) if embedded else None
    leaves = [*layer.parameters()] + [embedding] * embedded
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 3, (7, 4))
    gradients = []
    for run in (compiled, layer):
        output, _ = run(ids, embedding=embedding)
        gradients.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(IndexError):
        compiled(ids + 6, embedding=embedding)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(
        layer, (ids,), {"embedding": embedding}, dynamic_shapes={"input": {0: steps}, "embedding": None}
    )
    more = torch.randint(0, 3, (11, 4))
    torch.testing.assert_close(program.module()(more, embedding=embedding)[0], layer(more, embedding=embedding)[0])


def test_auto_takes_the_fastest_that_is_right(monkeypatch):
    x, reset = torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.bool)

    def chosen(cell: str, backend: str = "auto", **more: Tensor) -> str:
        states = [x] * len(find(cell).spec.states)
        return choose_backend(backend, Request.read(cell, x, states, [x, x], **more))

    if HAS_NATIVE:
        assert chosen("lstm") == "native"
    monkeypatch.setattr(native, "refusal", lambda request: "not here")
    assert chosen("lstm") == "torch"
    assert chosen("lstm", reset=reset) == "reference"
    assert chosen("gru_reset_before") == "reference"
    assert chosen("gru", "reference") == "reference"


VARIANTS = ["lstm+coupled+peepholes+layer_norm", "gru+layer_norm", "gru_reset_before+layer_norm", "rnn_tanh+layer_norm"]


def variant_arguments(name: str, backend: str, hidden: int = 4, steps: int = 5) -> tuple:
    name = "+".join([name, *mask_names(name)])
    x, state, _, lengths, reset, *_ = arguments(name.split("+")[0], backend, hidden=hidden, steps=steps)
    parameters = [p.requires_grad_() for p in random_parameters(name, 3, hidden)]
    return x, state, parameters, lengths, reset, random_masks(name, steps, 2, hidden), name, False, True, backend


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_the_operator_keeps_torchs_rules_with_variants(name, backend):
    torch.library.opcheck(torch.ops.throughtime.recurrence.default, variant_arguments(name, backend))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_variants_derivatives_of_first_and_second_order(name, backend):
    x, state, parameters, *rest = variant_arguments(name, backend, hidden=2, steps=3)

    def run(x: Tensor, *tensors: Tensor):
        initial, weights = list(tensors[: len(state)]), list(tensors[len(state) :])
        output, final, _ = torch.ops.throughtime.recurrence(x, initial, weights, *rest)
        return output, *final

    assert torch.autograd.gradcheck(run, (x, *state, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *state, *parameters))


BATCH_SIZES = torch.tensor([3, 2, 2, 1])


def packed_arguments(
    name: str, backend: str, recompute_every: int, tokens: bool, hidden: int = 4, batch_sizes: Tensor = BATCH_SIZES
) -> tuple:
    """As `variant_arguments`, of packed rows."""
    kind, rows, batch = find(name), int(batch_sizes.sum()), int(batch_sizes[0])
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) if not tokens else torch.randint(0, 3, (rows,))
    state = [torch.randn(batch, hidden, dtype=torch.float64, requires_grad=True) for _ in range(len(kind.spec.states))]
    parameters = [p.requires_grad_() for p in random_parameters(name, 3, hidden)]
    masks = random_masks(name, len(batch_sizes), batch, hidden)
    return x, state, parameters, None, None, masks, name, True, True, backend, batch_sizes, recompute_every


PACKED = [*CELLS, "lstm+layer_norm+zoneout_h+zoneout_c+recurrent_dropout", "rnn_tanh+zoneout_h"]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
@pytest.mark.parametrize(("recompute_every", "tokens"), [(0, False), (3, False), (0, True), (1, True)])
def test_packed_rows_and_recomputation_keep_torchs_rules(name, backend, recompute_every, tokens):
    given = packed_arguments(name, backend, recompute_every, tokens)
    torch.library.opcheck(torch.ops.throughtime.recurrence.default, given)
    _, state, parameters, _, _, masks, *rest = given
    padded = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True) if not tokens else torch.zeros(4, 3).long()
    more = (padded, state, parameters, torch.tensor([4, 0, 3]), None, masks, *rest[:-2], None, recompute_every)
    torch.library.opcheck(torch.ops.throughtime.recurrence.default, more)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_derivatives_of_packed_rows_of_first_and_second_order(name, backend, monkeypatch):
    monkeypatch.setattr(layout, "_STRETCH", 100)  # so that there is a segment for each step
    x, state, parameters, *rest = packed_arguments(
        name, backend, 1, False, hidden=2, batch_sizes=torch.tensor([2, 2, 1])
    )

    def run(x: Tensor, *tensors: Tensor):
        initial, weights = list(tensors[: len(state)]), list(tensors[len(state) :])
        output, final, _ = torch.ops.throughtime.recurrence(x, initial, weights, *rest)
        return output, *final

    assert torch.autograd.gradcheck(run, (x, *state, *parameters))
    if name != "rnn_relu":
        assert torch.autograd.gradgradcheck(run, (x, *state, *parameters))


@pytest.mark.parametrize("name", LAYERS)
def test_recomputing_layers_compile_and_export(name):
    torch.compiler.reset()
    layer = LAYERS[name](num_layers=2, bidirectional=True, recompute_every=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (6, 11):
        x = torch.randn(steps, 3, 3)
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            output, _ = module(x)
            output.sum().backward()
            results.append([output.detach(), *(p.grad for p in layer.parameters())])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(layer, (torch.randn(6, 3, 3),), dynamic_shapes=({0: steps},))
    x = torch.randn(11, 3, 3)
    torch.testing.assert_close(program.module()(x)[0], layer(x)[0])


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_a_negative_number_of_steps_is_refused(backend):
    with pytest.raises(ValueError, match="recompute_every = -1; expected a number of steps"):
        torch.ops.throughtime.recurrence(*packed_arguments("lstm", backend, -1, False))


@pytest.mark.parametrize("is_training", [True, False])
def test_variants_compile_and_export(is_training):
    layer = throughtime.LSTM(3, 4, 2, bidirectional=True, **EVERYTHING).train(is_training)
    x = torch.randn(6, 3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        torch.manual_seed(1)
        layer.zero_grad()
        output, _ = module(x)
        output.sum().backward()
        results.append([output.detach(), *(p.grad for p in layer.parameters())])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: steps},)).module()
    x = torch.randn(11, 3, 3)
    results = []
    for module in (layer, program):
        torch.manual_seed(1)
        results.append(module(x)[0])
    torch.testing.assert_close(*results)


EVERYTHING = {
    "layer_norm": True,
    "peepholes": True,
    "coupled": True,
    "zoneout": (0.3, 0.1),
    "recurrent_dropout": 0.2,
    "weight_drop": 0.2,
}


def test_fake_tensors_tell_the_shapes_of_a_projected_layer():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = throughtime.LSTM(3, 4, 2, proj_size=2, bidirectional=True, backend="reference")
        output, (h, c) = layer(torch.randn(7, 2, 3))
    assert output.shape == (7, 2, 4)
    assert h.shape == (4, 2, 2)
    assert c.shape == (4, 2, 4)


def test_parameters_travel_in_torchs_flat_order():
    tensors = [torch.zeros(index + 1) for index in range(5)]
    for count in (2, 3, 4, 5):
        there = tensors[:count]
        assert all(a is b for a, b in zip(Parameters.from_list(there).to_list(), there, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"layer_norm": True}])
def test_fake_tensors_tell_the_shapes_of_ragged_layers(name, options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer, x = LAYERS[name](**options), torch.randn(7, 2, 3, requires_grad=True)
        output, final = layer(x, lengths=torch.tensor([7, 2]))
        output.sum().backward()
        ids = layer(torch.zeros(7, 2, dtype=torch.int64), lengths=torch.tensor([7, 2]))[0]
    ways = 1 + options.get("bidirectional", False)
    assert output.shape == ids.shape == (7, 2, 4 * ways)
    assert (final[0] if isinstance(final, tuple) else final).shape == (ways, 2, 4)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which the compiler looks at
@pytest.mark.parametrize(("name", "is_sorted"), [("rnn", False), ("lstm", True), ("gru", False)])
def test_a_compiled_function_may_pack(name, is_sorted):
    torch.compiler.reset()
    layer = LAYERS[name](bidirectional=True).double()

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)
        output, final = layer(packed)
        return pad_packed_sequence(output)[0] + (final[0] if isinstance(final, tuple) else final).sum()

    compiled = torch.compile(run, backend="aot_eager")
    for steps, lengths in ((5, [5, 3]), (6, [6, 1])):
        x, results = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True), []
        for function in (run, compiled):
            output = function(x, torch.tensor(lengths))
            results.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("parametrized", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("kind", ["orthogonal", "weight_norm", "spectral_norm"])
def test_a_parametrization_that_autocast_rounds(name, parametrized, kind):
    layer, x = LAYERS[name](), torch.randn(5, 2, 3)
    getattr(nn.utils.parametrizations, kind)(layer, parametrized)
    results = []
    for rounds in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            output, _ = layer(x)
        results.append(torch.autograd.grad(output.float().square().sum(), list(layer.parameters())))
        assert output.dtype == (torch.bfloat16 if rounds else torch.float32)
    for a, e in zip(*results, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_an_ahead_of_time_package_runs(tmp_path, monkeypatch):
    # Where CI is set, Inductor refuses an operator in torch's table of decompositions, unless told to call it as it is.
    monkeypatch.setenv("CI", "1")
    lowering = importlib.import_module("torch._inductor.lowering")
    monkeypatch.delitem(lowering.lowerings, torch.ops.throughtime.recurrence.default, raising=False)
    layers = nn.ModuleList([throughtime.RNN(3, 4), throughtime.LSTM(4, 4, bidirectional=True), throughtime.GRU(8, 4)])

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for layer in layers:
                x, _ = layer(x)
            return x

    model, x = Model(), torch.randn(5, 2, 3)
    model.layers = layers
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))


@pytest.mark.skipif(not HAS_NATIVE, reason="only kernels make a table of all tokens")
def test_a_graph_makes_a_table_of_all_tokens_where_a_call_does():
    layer, embedding = throughtime.GRU(3, 4), torch.randn(5, 3, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in ((6, 2), (2, 2)):  # more tokens than embeddings, and fewer
        ids, results = torch.randint(5, shape), []
        for module in (layer, compiled):
            output, _ = module(ids, embedding=embedding)
            gradients = torch.autograd.grad(output.square().sum(), [embedding, *layer.parameters()])
            results.append([output, *gradients])
        assert all(map(torch.equal, *results))
