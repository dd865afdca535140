"""Models that hold our layers, traced by torch.jit and torch.fx: they compute the same, or it is said what to do instead."""

import copy
import io
import re
import warnings

import pytest
import torch
from comparison import BACKENDS
from torch import nn
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, quantize_fx

import throughtime

CELLS = {
    "rnn": throughtime.RNN,
    "lstm": throughtime.LSTM,
    "lstm_projected": lambda *a, **k: throughtime.LSTM(*a, proj_size=3, **k),
    "gru": throughtime.GRU,
    "mgu": throughtime.MGU,
    "peepholes": lambda *a, **k: throughtime.LSTM(*a, peepholes=True, **k),
}
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks of shapes, as of torch.nn's


class Model(nn.Module):
    """Reads the output and the final state, and is given a state and more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.output = layer, nn.Linear(layer.output_size * (1 + layer.bidirectional), 2)

    def forward(self, x, hx=None, lengths=None, mask=None, reset=None, reset_to=None):
        y, final = self.layer(x, hx, lengths=lengths, mask=mask, reset=reset, reset_to=reset_to)
        final = final[0] if isinstance(self.layer, throughtime.LSTM) else final
        return self.output(y), final


def same(actual, expected) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_torch_jit_traces_with_its_default_check_any_number_of_steps_and_rows(name, trains, options):
    model, x = Model(CELLS[name](5, 4, **options)), torch.randn(6, 3, 5)
    with torch.set_grad_enabled(trains):
        traced = torch.jit.trace(model, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for other in (x, torch.randn(9, 2, 5)):
        same(traced(other), model(other))
        same(loaded(other), model(other))
    with torch.no_grad():
        same(traced(x), model(x))
    traced(x)[0].square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x)[0].square().sum().backward()
    same(found, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_backend_is_traced(backend):
    layer, x = throughtime.GRU(5, 4, backend=backend), torch.randn(6, 3, 5)
    same(torch.jit.trace(layer, x)(x), layer(x))


class Called(nn.Module):
    """A model called in some way."""

    def __init__(self, call, **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *given):
        return self.call(self, *given)


def test_a_traced_graph_decides_nothing_by_the_values_it_was_traced_with():
    """Masks without a hole and windows without a reset are computed a shorter way, and many tokens by a table."""
    layer, x, state = throughtime.GRU(5, 4), torch.randn(6, 3, 5), torch.randn(1, 3, 4)
    model = Called(lambda own, x, h, mask, reset: own.layer(x, h, mask=mask, reset=reset), layer=layer)
    whole, none = torch.ones(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    traced = torch.jit.trace(model, (x, state, whole, none))
    for steps, rows in ((6, 3), (9, 2), (1, 1)):
        given = torch.randn(steps, rows, 5), torch.randn(1, rows, 4), torch.rand(steps, rows) < 0.6
        reset = torch.rand(steps, rows) < 0.3
        same(traced(*given, reset), model(*given, reset))
    model = Called(lambda own, ids: own.layer(ids, embedding=own.rows.weight), layer=layer, rows=nn.Embedding(7, 5))
    traced = torch.jit.trace(model, torch.randint(7, (6, 3)))
    few = torch.randint(7, (2, 1))
    same(traced(few), model(few))


def test_what_the_traced_graph_keeps_is_what_a_call_needs():
    """Nothing for its gradient where none is wanted, whether it was traced with one or not."""
    layer, x = throughtime.LSTM(5, 4), torch.randn(6, 3, 5)
    graphs = [str(torch.jit.trace(layer, x).inlined_graph)]
    with torch.no_grad():
        graphs.append(str(torch.jit.trace(layer, x).inlined_graph))
    assert len({re.sub(r"___torch_mangle_\d+\.|requires_grad=\d", "", graph) for graph in graphs}) == 1


@pytest.mark.parametrize("name", CELLS)
def test_torch_fx_has_a_layer_as_one_node(name):
    model = Model(CELLS[name](5, 4, 2, bidirectional=True))
    x, lengths, reset = torch.randn(6, 3, 5), torch.tensor([6, 0, 2]), torch.rand(6, 3) < 0.3
    h = torch.randn(4, 3, model.layer.output_size)
    hx = (h, torch.randn(4, 3, 4)) if isinstance(model.layer, throughtime.LSTM) else h
    traced = torch.fx.symbolic_trace(model)
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in nodes] == ["layer", "output"]
    same(traced(x, hx, lengths, None, reset, hx), model(x, hx, lengths, None, reset, hx))
    plain = torch.fx.symbolic_trace(model, concrete_args=dict.fromkeys(["hx", "lengths", "mask", "reset", "reset_to"]))
    assert next(node for node in plain.graph.nodes if node.op == "call_module").kwargs == {}
    same(plain(x), model(x))
    assert type(plain.layer) is type(model.layer)
    mask = torch.rand(6, 3) < 0.8
    same(traced(x, None, None, mask, None, None), model(x, None, None, mask))


def test_a_layer_with_a_pair_of_states_and_given_what_others_made():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(5, 4), throughtime.LSTM(5, 4)

        def forward(self, x, h, c):
            _, state = self.encoder(x, (h, c))
            y, (h, c) = self.decoder(x, state)
            z, _ = self.decoder(x, (h, c))
            return y, z

    model, x, h = Decoder(), torch.randn(6, 3, 5), torch.randn(1, 3, 4)
    same(torch.fx.symbolic_trace(model)(x, h, h), model(x, h, h))


def test_what_torch_fx_can_not_trace_is_said():
    with pytest.raises(TypeError, match="can't trace a LSTM by itself; expected a module that has it"):
        torch.fx.symbolic_trace(throughtime.LSTM(5, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torch_jit_script_says_what_to_do_and_leaves_the_model_as_it_is():
    model, x = nn.Sequential(nn.Sequential(throughtime.LSTM(5, 4))), torch.randn(6, 3, 5)
    with pytest.raises(
        throughtime.InputError, match=r"throughtime\.LSTM; script throughtime\.to_torch\(copy\.deepcopy\(model\)\)"
    ):
        torch.jit.script(model)
    assert type(model[0][0]) is throughtime.LSTM
    scripted = torch.jit.script(throughtime.to_torch(copy.deepcopy(model)))
    torch.testing.assert_close(scripted(x)[0], model(x)[0])


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:torch.ao leaves a throughtime.LSTM in float, since it wasn't asked for")
def test_quantisation_that_traces_a_model_warns_of_what_it_leaves_in_float():
    model, x = Model(throughtime.LSTM(5, 4)).eval(), torch.randn(6, 3, 5)
    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    with pytest.warns(
        UserWarning, match="leaves a throughtime.LSTM in float where it traces a model: quantise throughtime.to_torch"
    ):
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    made = quantize_fx.convert_fx(prepared)
    torch.testing.assert_close(made.layer(x)[0], model.layer(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(made(x)[1], model(x)[1])
