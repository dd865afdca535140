"""RNNCell, LSTMCell, GRUCell, MGUCell: torch's cells in all that those have; the layers' steps in what torch doesn't have."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from comparison import (
    BACKENDS,
    GRADIENT_FACTOR,
    HAS_NATIVE,
    OUTPUT_FACTOR,
    assert_as_accurate,
    gradients,
    least_accurate,
    moved,
)
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

import throughtime
from throughtime import steps

THEIRS = {
    "RNNCell": (nn.RNNCell, throughtime.RNNCell, {}),
    "RNNCell, relu": (nn.RNNCell, throughtime.RNNCell, {"nonlinearity": "relu"}),
    "LSTMCell": (nn.LSTMCell, throughtime.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, throughtime.GRUCell, {}),
}
PLAIN = {  # of each cell, the layer of which it is a step
    "rnn": (throughtime.RNNCell, throughtime.RNN, {}),
    "rnn_relu": (throughtime.RNNCell, throughtime.RNN, {"nonlinearity": "relu"}),
    "lstm": (throughtime.LSTMCell, throughtime.LSTM, {}),
    "gru": (throughtime.GRUCell, throughtime.GRU, {}),
}
OTHERS = {
    "gru_reset_before": (throughtime.GRUCell, throughtime.GRU, {"reset_after": False}),
    "mgu": (throughtime.MGUCell, throughtime.MGU, {}),
    "lstm_varied": (throughtime.LSTMCell, throughtime.LSTM, {"peepholes": True, "coupled": True, "layer_norm": True}),
    "rnn_normalised": (throughtime.RNNCell, throughtime.RNN, {"layer_norm": True}),
    "gru_zoneout": (throughtime.GRUCell, throughtime.GRU, {"zoneout": 0.2}),
    "lstm_zoneout": (throughtime.LSTMCell, throughtime.LSTM, {"zoneout": (0.3, 0.1)}),
}
CELLS = {**PLAIN, **OTHERS}


def make(name: str, inputs: int = 3, hidden: int = 4, **options) -> tuple[steps.Cell, throughtime.RNN]:
    """A cell and the layer with its weights, in evaluation, where zoneout draws nothing."""
    kind, layer, own = CELLS[name]
    torch.manual_seed(0)
    cell, whole = kind(inputs, hidden, **own, **options), layer(inputs, hidden, **own, **options)
    whole.load_state_dict({f"{name}_l0": tensor for name, tensor in cell.state_dict().items()})
    return cell.eval(), whole.eval()


def state_of(cell: nn.Module, *shape: int, dtype: torch.dtype = torch.float32):
    drawn = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    return tuple(drawn) if isinstance(cell, nn.LSTMCell | throughtime.LSTMCell) else drawn[0]


def as_tuple(state) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def same(actual, expected, **tolerance) -> None:
    for a, e in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def pair(name: str, inputs: int = 3, hidden: int = 4, **options):
    """torch's cell, and ours with its weights."""
    theirs, ours, own = THEIRS[name]
    peer, cell = theirs(inputs, hidden, **own, **options), ours(inputs, hidden, **own, **options)
    cell.load_state_dict(peer.state_dict())
    return peer, cell


def run(cell: nn.Module, x: Tensor, state=None) -> list[Tensor]:
    """The states of all steps."""
    found = []
    for x_t in x:
        state = cell(x_t, state)
        found += as_tuple(state)
    return found


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_torchs_and_go_both_ways(name, bias):
    theirs, ours, own = THEIRS[name]
    torch.manual_seed(3)
    peer = theirs(5, 7, bias, **own)
    torch.manual_seed(3)
    cell = ours(5, 7, bias, **own)
    assert list(cell.state_dict()) == list(peer.state_dict())
    assert all(torch.equal(cell.state_dict()[key], tensor) for key, tensor in peer.state_dict().items())
    assert (cell.bias_ih is None) is (not bias)
    assert str(cell) == str(peer)
    assert isinstance(cell, nn.RNNCellBase)
    theirs(5, 7, bias, **own).load_state_dict(cell.state_dict())


def of_arguments(module: nn.Module):
    """A function of three steps' inputs, the state and the parameters, in this order, that returns the states of all steps."""
    names = [key for key, _ in module.named_parameters()]

    def call(x: Tensor, *rest: Tensor) -> list[Tensor]:
        count = len(rest) - len(names)
        state = rest[:count] if count == 2 else rest[0]
        weights, found = dict(zip(names, rest[count:], strict=True)), []
        for x_t in x:
            state = torch.func.functional_call(module, weights, (x_t, state))
            found += as_tuple(state)
        return found

    return call


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 5), (7, 33, 17), (5, 1, 130)])
@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_as_accurate_as_torchs(name, sizes, has_gradient, bias):
    rows, inputs, hidden = sizes
    peer, cell = pair(name, inputs, hidden, bias=bias)
    state = as_tuple(state_of(cell, rows, hidden))
    with torch.set_grad_enabled(has_gradient):
        for initial in (state, tuple(map(torch.zeros_like, state))):
            arguments = [torch.randn(4, rows, inputs), *initial, *(p.detach() for p in peer.parameters())]
            exact = of_arguments(peer)(*(a.double() for a in arguments))
            near = [moved(arguments, torch.float32, seed) for seed in range(8)]  # many: some results are few numbers
            honest = [of_arguments(peer)(*a) for a in (arguments, *near)]
            found = run(cell, arguments[0], initial if len(initial) == 2 else initial[0])
            assert_as_accurate(found, least_accurate(exact, *honest), exact, OUTPUT_FACTOR)
    same(run(cell, arguments[0], None), found)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_gradients_are_as_accurate_as_torchs(name, backend):
    if backend not in ("auto", *BACKENDS):
        pytest.skip("the native kernels aren't built")
    peer, cell = pair(name, 5, 9, dtype=torch.float32)
    cell.backend = backend
    state = as_tuple(state_of(cell, 6, 9))
    arguments = [torch.randn(3, 6, 5), *state, *(p.detach() for p in peer.parameters())]
    exact = gradients(of_arguments(peer), [a.double() for a in arguments])
    honest = [gradients(of_arguments(peer), a) for a in (arguments, moved(arguments, torch.float32))]
    found = gradients(of_arguments(cell), arguments)
    assert_as_accurate(found, least_accurate(exact, *honest), exact, GRADIENT_FACTOR)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_gradcheck(name, backend):
    if backend not in ("auto", *BACKENDS):
        pytest.skip("the native kernels aren't built")
    cell, _ = make(name, 2, 3, dtype=torch.float64, backend=backend)
    arguments = [torch.randn(2, 2, dtype=torch.float64), *as_tuple(state_of(cell, 2, 3, dtype=torch.float64))]

    def call(x: Tensor, *state: Tensor):
        return cell(x, state if len(state) == 2 else state[0])

    arguments = [a.requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_without_gradient_a_step_has_the_bits_of_the_layers(name, dtype, rows):
    cell, layer = make(name, 5, 18, dtype=dtype)
    x, state = torch.randn(6, rows, 5, dtype=dtype), state_of(cell, rows, 18, dtype=dtype)
    with torch.no_grad():
        output, final = layer(x, tuple(s[None] for s in state) if isinstance(state, tuple) else state[None])
        found = run(cell, x, state)
    each = len(as_tuple(state))
    if HAS_NATIVE:
        assert all(map(torch.equal, found[::each], output))
    same(tuple(found[-each:]), tuple(s[0] for s in as_tuple(final)))


@pytest.mark.parametrize("name", OTHERS)
def test_what_torch_has_no_cell_for_is_a_step_of_the_layer_with_its_gradients(name):
    cell, layer = make(name, 5, 8, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    output, _ = layer(x)
    found = torch.stack(run(cell, x)[:: len(cell._spec.states)])
    same(found, output)
    found.square().sum().backward()
    output.square().sum().backward()
    for key, parameter in cell.named_parameters():
        same(parameter.grad, layer.get_parameter(f"{key}_l0").grad)


def test_zoneout_draws_in_each_call_while_training():
    cell = throughtime.GRUCell(3, 200, zoneout=0.5)
    x, h = torch.randn(1, 3), torch.randn(1, 200)
    torch.manual_seed(0)
    first, second = (cell(x, h) == h for _ in range(2))
    assert 0.3 < float(first.float().mean()) < 0.7
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(cell(x, h) == h, first)
    lstm = throughtime.LSTMCell(3, 200, zoneout=(0.9, 0.0))
    _, c = lstm(x, (h, h))
    assert float((c == h).float().mean()) > 0.8


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("has_gradient", [True, False])
def test_one_row_without_its_axis(name, has_gradient):
    cell, _ = make(name)
    x, state = torch.randn(3), state_of(cell, 4)
    batch = tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
    with torch.set_grad_enabled(has_gradient):
        for found, expected in ((cell(x, state), cell(x[None], batch)), (cell(x), cell(x[None]))):
            assert all(s.shape == (4,) for s in as_tuple(found))
            same(found, tuple(s[0] for s in expected) if isinstance(expected, tuple) else expected[0])


@pytest.mark.parametrize("name", CELLS)
def test_no_rows_give_none(name):
    cell, _ = make(name)
    assert {s.shape for s in as_tuple(cell(torch.randn(0, 3)))} == {(0, 4)}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("has_gradient", [True, False])
def test_tensors_that_lie_otherwise_are_the_same_and_stay_as_they_are(name, has_gradient):
    cell, _ = make(name)
    x, state = torch.randn(3, 2).T, torch.randn(8, 2).T[:, ::2]
    state = (state, state) if isinstance(cell, throughtime.LSTMCell) else state
    kept = [s.clone() for s in as_tuple(state)]
    with torch.set_grad_enabled(has_gradient):
        found = cell(x, state)
        expected = cell(x.clone(), tuple(s.contiguous() for s in state) if isinstance(state, tuple) else state.clone())
    same(found, expected)
    assert all(map(torch.equal, as_tuple(state), kept))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_half_precision_is_near_float32(name, dtype, has_gradient):
    cell, _ = make(name, 5, 16)
    x, state = torch.randn(3, 5), state_of(cell, 3, 16)
    expected = cell(x, state)
    cell.to(dtype)
    with torch.set_grad_enabled(has_gradient):
        found = cell(x.to(dtype), tuple(s.to(dtype) for s in state) if isinstance(state, tuple) else state.to(dtype))
    assert all(s.dtype == dtype for s in as_tuple(found))
    same(tuple(s.float() for s in as_tuple(found)), as_tuple(expected), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_autocast_does_what_it_does_for_torchs(name, dtype, has_gradient):
    peer, cell = pair(name)
    x, state = torch.randn(2, 3), state_of(cell, 2, 4)
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(has_gradient):
        for given in (state, cell(x.to(dtype), state), None):
            same(cell(x, given), peer(x, given), rtol=0, atol=0)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_what_torch_does_not_have_keeps_its_state_in_float32(name, backend):
    cell, _ = make(name, backend=backend)
    x, state = torch.randn(2, 3), state_of(cell, 2, 4)
    expected = cell(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        same(cell(x, state), expected)
        found = cell(x.bfloat16(), state)
    same(found, expected, rtol=0.02, atol=0.02)
    assert all(s.dtype == torch.float32 for s in as_tuple(found))


def test_weights_that_a_parametrization_makes_in_autocasts_dtype_are_served():
    cell = throughtime.LSTMCell(3, 4, peepholes=True)
    parametrizations.orthogonal(cell, "weight_hh")
    x, state = torch.randn(2, 3), state_of(cell, 2, 4)
    expected = cell(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert cell.weight_hh.dtype == torch.bfloat16
        same(cell(x, state), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", CELLS)
def test_it_compiles_whole_and_is_exported_and_traced(name):
    cell, _ = make(name)
    x, state = torch.randn(3, 3), state_of(cell, 3, 4)
    expected = cell(x, state)
    torch.compiler.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    same(compiled(x, state), expected)
    with torch.no_grad():
        same(compiled(x, state), expected)
    rows = torch.export.Dim("B", min=2)
    shapes = {"input": {0: rows}, "hx": ({0: rows}, {0: rows}) if isinstance(state, tuple) else {0: rows}}
    program = torch.export.export(cell, (x, state), dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(cell, (x, state))
    other, others = torch.randn(7, 3), state_of(cell, 7, 4)
    same(program.module()(other, others), cell(other, others))
    same(traced(other, others), cell(other, others))


@pytest.mark.parametrize("name", CELLS)
def test_it_is_a_node_of_torch_fx(name):
    cell, _ = make(name)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x, state):
            return self.cell(x, self.cell(x, state))

    model, x, state = Model(), torch.randn(2, 3), state_of(cell, 2, 4)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["cell", "cell"]
    same(traced(x, state), model(x, state))
    with pytest.raises(TypeError, match=f"torch.fx can't trace a {type(cell).__name__} by itself"):
        torch.fx.symbolic_trace(cell)


@pytest.mark.parametrize("name", CELLS)
def test_transforms_of_torch_func(name):
    cell, _ = make(name, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    state = state_of(cell, 5, 2, 4, dtype=torch.float64)
    each = zip(*state, strict=True) if isinstance(state, tuple) else state
    expected = [as_tuple(cell(one, own)) for one, own in zip(x, each, strict=True)]
    same(torch.func.vmap(cell)(x, state), tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))
    parameters = dict(cell.named_parameters())

    def loss(parameters, x):
        return as_tuple(torch.func.functional_call(cell, parameters, (x,)))[0].square().sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[0])
    for row in range(2):
        own = torch.autograd.grad(loss(parameters, x[0, row]), list(parameters.values()))
        same(tuple(g[row] for g in by_sample.values()), own)
    tangent = torch.randn_like(x[0])
    _, along = torch.func.jvp(lambda x: as_tuple(cell(x))[0], (x[0],), (tangent,))
    near = [as_tuple(cell(x[0] + step * tangent))[0] for step in (1e-6, -1e-6)]
    same(along, (near[0] - near[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CELLS)
def test_copies_and_pickles_compute_the_same(name):
    cell, _ = make(name)
    x, state = torch.randn(2, 3), state_of(cell, 2, 4)
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), torch.load(file, weights_only=False)):
        assert str(other) == str(cell)
        same(other(x, state), cell(x, state))


@pytest.mark.parametrize("name", THEIRS)
def test_a_pickle_of_torchs_is_loaded_where_ours_stands_in_its_place(name, monkeypatch):
    theirs, ours, own = THEIRS[name]
    peer = theirs(3, 4, **own)
    pickled, x = pickle.dumps(peer), torch.randn(2, 3)
    monkeypatch.setattr(nn.modules.rnn, theirs.__name__, ours)
    loaded = pickle.loads(pickled)
    assert type(loaded) is ours
    same(loaded(x), peer(x))


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_convert_and_to_torch(name, bias):
    theirs, ours, own = THEIRS[name]
    model = nn.ModuleDict({"cell": theirs(3, 4, bias, **own), "read": nn.Linear(4, 2)})
    model["cell"].note = "kept"
    weight, x = model["cell"].weight_hh, torch.randn(2, 3)
    expected = model["cell"](x)
    assert throughtime.convert(model) is model
    assert type(model["cell"]) is ours
    assert model["cell"].weight_hh is weight
    assert str(model["cell"]) == str(theirs(3, 4, bias, **own))
    same(model["cell"](x), expected)
    with torch.no_grad():
        same(model["cell"](x), expected)
    throughtime.to_torch(model)
    assert (type(model["cell"]), model["cell"].note) == (theirs, "kept")
    assert vars(model["cell"]).keys() == {*vars(theirs(3, 4, bias, **own)), "note"}
    same(model["cell"](x), expected)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: type("Own", (nn.LSTMCell,), {})(3, 4), "derived from torch.nn.LSTMCell"),
        (lambda: nn.RNNCell(3, 4, nonlinearity="sigmoid"), "sigmoid"),
    ],
)
def test_what_can_not_be_converted_is_named(make, reason):
    model = nn.Sequential(nn.GRUCell(3, 4), make())
    with pytest.raises(throughtime.InputError, match=rf"1 .*{reason}.*leave=\['1'\]"):
        throughtime.convert(model)
    assert type(model[0]) is nn.GRUCell


def test_an_attribute_with_a_name_of_ours_is_not_lost():
    cell = nn.GRUCell(3, 4)
    cell.zoneout = 0.1
    with pytest.raises(throughtime.InputError, match="attribute 'zoneout' of somebody's"):
        throughtime.convert(cell)


@pytest.mark.parametrize("name", OTHERS)
def test_what_torch_does_not_have_does_not_go_back(name):
    cell, _ = make(name)
    with pytest.raises(throughtime.InputError, match=r"torch\.nn doesn't have"):
        throughtime.to_torch(cell)


def test_initialisations_take_cells():
    for cell, gates, own in ((throughtime.LSTMCell(3, 4), 4, "forget:2"), (throughtime.GRUCell(3, 4), 3, "update:2")):
        throughtime.init.initialise_(cell, own)
        assert (cell.bias_ih + cell.bias_hh).chunk(gates)[1].tolist() == [2.0] * 4
        throughtime.init.chrono_(cell, 10)
        assert (cell.bias_ih + cell.bias_hh).chunk(gates)[1].exp().max() <= 9
    coupled = throughtime.init.chrono_(throughtime.LSTMCell(3, 4, coupled=True), 10)
    assert (coupled.bias_ih + coupled.bias_hh)[:4].exp().min() >= 1
    cell = throughtime.init.orthogonal_(throughtime.MGUCell(3, 4))
    for block in cell.weight_hh.chunk(2):
        same(block @ block.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    model = throughtime.init.initialise_model_(nn.Sequential(throughtime.LSTMCell(3, 4)), "forget:3")
    assert (model[0].bias_ih + model[0].bias_hh)[4:8].tolist() == [3.0] * 4
    with pytest.raises(throughtime.InputError, match="is for LSTM, not for GRUCell"):
        throughtime.init.initialise_(throughtime.GRUCell(3, 4), "forget:1")
    with pytest.raises(throughtime.InputError, match="GRUCell has no biases"):
        throughtime.init.update_bias_(throughtime.GRUCell(3, 4, bias=False))


@pytest.mark.parametrize("name", THEIRS)
def test_weights_are_those_of_the_moment(name):
    """However they were changed: in place, set, parametrized, pruned, tied."""
    peer, cell = pair(name, 4, 4)
    x, state = torch.randn(2, 4), state_of(cell, 2, 4)

    def agree() -> None:
        peer.weight_hh.data.copy_(cell.weight_hh)
        for has_gradient in (True, False):
            with torch.set_grad_enabled(has_gradient):
                same(cell(x, state), peer(x, state))

    with torch.no_grad():
        cell.weight_hh.mul_(1.5)
    agree()
    cell.weight_hh = nn.Parameter(torch.randn_like(cell.weight_hh).T.contiguous().T)
    agree()
    parametrizations.weight_norm(cell, "weight_hh")
    agree()
    torch.nn.utils.parametrize.remove_parametrizations(cell, "weight_hh")
    prune.l1_unstructured(cell, "weight_hh", 0.5)
    agree()


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_quantisation_by_torch_warns_and_leaves_it():
    model = nn.Sequential(throughtime.LSTMCell(3, 4))
    with pytest.warns(UserWarning, match="leaves a throughtime.LSTMCell in float.*quantise throughtime.to_torch"):
        made = quantization.quantize_dynamic(model, {throughtime.LSTMCell, nn.LSTMCell})
    assert type(made[0]) is throughtime.LSTMCell
    made = quantization.quantize_dynamic(throughtime.to_torch(copy.deepcopy(model)), {nn.LSTMCell})
    same(made[0](torch.ones(1, 3)), model[0](torch.ones(1, 3)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", CELLS)
def test_script_is_refused_with_advice(name):
    cell, _ = make(name)
    with pytest.raises(throughtime.InputError, match="to_torch"):
        torch.jit.script(nn.Sequential(cell))


X, H = torch.zeros(2, 3), torch.zeros(2, 4)


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("name", ["lstm", "gru", "mgu", "lstm_varied"])
@pytest.mark.parametrize(
    ("x", "h", "error", "said"),
    [
        (torch.zeros(2, 2, 3), None, ValueError, "Cell: Expected input to be 1D or 2D, got 3D instead"),
        (torch.zeros(()), None, ValueError, "Cell: Expected input to be 1D or 2D, got 0D instead"),
        ([1.0], None, TypeError, "input is a list of 1; expected a tensor"),
        (X, torch.zeros(1, 2, 4), ValueError, r"Expected (hidden|hx\[0\]) to be 1D or 2D, got 3D instead"),
        (X, 1.5, TypeError, "(hidden|hx.0.) is float; expected a tensor"),
        (torch.zeros(2, 5), None, RuntimeError, "input has inconsistent input_size: got 5 expected 3"),
        (torch.zeros(5), None, RuntimeError, "input has inconsistent input_size: got 5 expected 3"),
        (X, torch.zeros(2, 5), RuntimeError, "hidden0 has inconsistent hidden_size: got 5, expected 4"),
        (X, torch.zeros(3, 4), RuntimeError, "Input batch size 2 doesn't match hidden0 batch size 3"),
        (X, torch.zeros(2), RuntimeError, r"has shape \[2\], but the input is \[2, 3\]"),
        (X[0], torch.zeros(1, 4), RuntimeError, r"has shape \[1, 4\], but the input is \[3\]"),
        (X.double(), None, RuntimeError, "[dD]ouble|float64"),
        (X.long(), None, RuntimeError, "Long|int64"),
        (X, H.double(), RuntimeError, "[dD]ouble|float64"),
        (X.to("meta"), None, RuntimeError, "meta"),
    ],
)
def test_what_does_not_fit_is_refused(name, has_gradient, x, h, error, said):
    cell, _ = make(name)
    h = (h, h) if h is not None and isinstance(cell, throughtime.LSTMCell) else h
    with torch.set_grad_enabled(has_gradient), pytest.raises(error, match=said):
        cell(x, h)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("part", ["weight_ih", "weight_hh", "bias_hh"])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_parameter_of_another_shape_is_refused(name, part, has_gradient):
    cell, _ = make(name)
    cell.get_parameter(part).data = torch.zeros(2, 2) if part.startswith("weight") else torch.zeros(3)
    with torch.set_grad_enabled(has_gradient), pytest.raises((RuntimeError, ValueError)):
        cell(X, (H, H) if isinstance(cell, throughtime.LSTMCell) else H)


@pytest.mark.parametrize("hx", [H, (H,), (H, H, H), 3])
def test_an_lstms_state_is_a_pair(hx):
    with pytest.raises(TypeError, match=r"expected a pair \(h, c\)"):
        throughtime.LSTMCell(3, 4)(X, hx)
    same(throughtime.LSTMCell(3, 4)(X, [H, H])[0].shape, (2, 4))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: throughtime.RNNCell(0, 4), ValueError, "input_size must be greater than zero, got 0"),
        (lambda: throughtime.GRUCell(3, -1), ValueError, "hidden_size must be greater than zero, got -1"),
        (lambda: throughtime.GRUCell(3, 4.0), TypeError, "hidden_size should be of type int, got: float"),
        (lambda: throughtime.GRUCell(3, 4, 5), TypeError, "bias should be of type bool, got: int"),
        (lambda: throughtime.RNNCell(3, 4, nonlinearity="tan"), ValueError, "tan"),
        (lambda: throughtime.MGUCell(3, 4, zoneout=1.0), ValueError, "zoneout"),
        (lambda: throughtime.GRUCell(3, 4, zoneout=(0.1, 0.1)), ValueError, "zoneout"),
        (lambda: throughtime.GRUCell(3, 4, backend="cuda"), ValueError, "backend"),
        (lambda: throughtime.LSTMCell(3, 4, recurrent_dropout=0.1), TypeError, "recurrent_dropout"),
        (lambda: throughtime.LSTMCell(3, 4, proj_size=2), TypeError, "proj_size"),
        (lambda: throughtime.MGUCell(3, 4, backend="torch")(X), NotImplementedError, "backend 'torch'"),
        (lambda: throughtime.GRUCell(3, 4, dtype=torch.complex64, layer_norm=True)(X), TypeError, "complex64"),
    ],
)
def test_arguments_that_are_none_are_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_who_takes_the_step(monkeypatch):
    """The kernels without gradient, torch's own call with; each where it is insisted on."""
    taken = []
    for of, name in ((steps.direct, "forward"), (steps.stack, "run")):
        own = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *given, own=own, name=name: (taken.append(name), own(*given))[1])
    monkeypatch.setitem(steps._TORCHS, "lstm", lambda *given: (taken.append("torch"), torch.lstm_cell(*given))[1])
    for backend, has_gradient, expected in (
        ("auto", False, "forward"),
        ("auto", True, "torch"),
        ("torch", False, "torch"),
        ("native", False, "forward"),
        ("native", True, "run"),
        ("reference", False, "run"),
    ):
        with torch.set_grad_enabled(has_gradient):
            throughtime.LSTMCell(3, 4, backend=backend)(X)
        assert taken == [expected], backend
        taken.clear()


@pytest.mark.parametrize("name", THEIRS)
def test_a_field_that_torch_does_not_read_changes_nothing(name):
    peer, cell = pair(name, 3, 4)
    x, state = torch.randn(2, 3), state_of(cell, 2, 4)
    cell.bias = peer.bias = False
    for has_gradient in (True, False):
        with torch.set_grad_enabled(has_gradient):
            same(cell(x, state), peer(x, state))
