"""Layers in torch's two exporters to ONNX: standard nodes, which ONNX Runtime computes as the layers do, or a refusal by name."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime
from throughtime.kernels import native

pytest.importorskip("onnxruntime", reason="the extra throughtime[onnx] isn't installed")
pytest.importorskip("onnxscript", reason="the extra throughtime[onnx] isn't installed")

from onnx_models import EXPORTERS, Layer, arguments, attributes, computed, exported, recurrent

LAYERS = {
    "LSTM": lambda: throughtime.LSTM(5, 4),
    "LSTM, 2 layers, both ways, batch first": lambda: throughtime.LSTM(
        5, 4, 2, bidirectional=True, batch_first=True, dropout=0.5
    ),
    "LSTM without biases": lambda: throughtime.LSTM(5, 4, bias=False),
    "peepholes": lambda: throughtime.LSTM(5, 4, peepholes=True, bidirectional=True),
    "coupled": lambda: throughtime.LSTM(5, 4, coupled=True),
    "coupled, with peepholes": lambda: throughtime.LSTM(5, 4, coupled=True, peepholes=True, bidirectional=True),
    "GRU": lambda: throughtime.GRU(5, 4, 2, bidirectional=True),
    "GRU, reset before": lambda: throughtime.GRU(5, 4, reset_after=False, bidirectional=True),
    "GRU, reset before, without biases": lambda: throughtime.GRU(5, 4, reset_after=False, bias=False),
    "RNN": lambda: throughtime.RNN(5, 4, bidirectional=True),
    "RNN, relu": lambda: throughtime.RNN(5, 4, 3, nonlinearity="relu"),
    "MGU": lambda: throughtime.MGU(5, 4, bidirectional=True),
    "what only drops in training": lambda: throughtime.LSTM(5, 4, recurrent_dropout=0.5, weight_drop=0.5),
}
# The exporter by torch.export takes ten seconds and more for a model.
CASES = [(name, "traced") for name in LAYERS] + [
    pytest.param(name, "dynamo", marks=pytest.mark.slow)
    for name in ("LSTM, 2 layers, both ways, batch first", "coupled, with peepholes", "GRU", "RNN, relu", "MGU")
]


def same(actual, expected, tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_nodes_compute_what_layers_do_whatever_the_steps_the_rows_and_their_lengths(name, exporter):
    layer = LAYERS[name]().eval()
    model = Layer(layer).eval()
    made = exported(model, arguments(layer, 6, 3), EXPORTERS[exporter], layer.batch_first)
    is_one_by_one = native.module is None and exporter == "dynamo"  # the operator is then each direction by itself
    assert len(recurrent(made)) == layer.num_layers * (1 + (layer.bidirectional and is_one_by_one))
    for given in (arguments(layer, 6, 3), arguments(layer, 9, 5, [2, 9, 0, 1, 4]), arguments(layer, 1, 1, [1])):
        same(computed(made, given), model(*given))


@pytest.mark.parametrize("name", LAYERS)
def test_the_nodes_are_the_standard_ones(name):
    layer = LAYERS[name]().eval()
    nodes = recurrent(exported(Layer(layer), arguments(layer, 6, 3), dynamo=False, batch_first=layer.batch_first))
    kind = {"MGU": "GRU"}.get(layer._kind, layer._kind)
    for node in nodes:
        said = attributes(node)
        assert node.op_type == kind
        assert said["hidden_size"] == 4
        assert said["direction"] == (b"bidirectional" if layer.bidirectional else b"forward")
        assert said.get("linear_before_reset") == {"GRU": int(layer.cell == "gru")}.get(kind)
        assert said.get("activations") == (
            [layer.nonlinearity.capitalize().encode()] * (1 + layer.bidirectional) if kind == "RNN" else None
        )
        x, w, r, b, lengths, h, *rest = node.input
        assert bool(b) == layer.bias
        assert all((x, w, r, lengths, h, *rest))
        assert len(rest) == len(layer._spec.states) - 1 + getattr(layer, "peepholes", False)


@pytest.mark.parametrize("exporter", ["traced", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_a_model_is_exported_by_one_call_and_needs_neither_lengths_nor_states(exporter):
    model = nn.Sequential(nn.Linear(5, 3), throughtime.GRU(3, 4)).eval()
    x = torch.randn(6, 3, 5)
    made = exported(model, (x,), EXPORTERS[exporter])
    other = torch.randn(2, 4, 5)
    output, h = model(other)
    same(computed(made, (other,)), (output, h))
    assert not recurrent(made)[0].input[4]


@pytest.mark.slow
def test_what_torch_export_has_made_before_is_translated_too():
    layer = throughtime.LSTM(5, 4).eval()
    x = torch.randn(6, 3, 5)
    program = torch.export.export(Layer(layer), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(program, (x,), dynamo=True, verbose=False).model_proto
    same(computed(made, (x,)), Layer(layer)(x))
    assert [node.op_type for node in recurrent(made)] == ["LSTM"]


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_a_file_knows_no_backend(backend):
    if backend not in throughtime.backends():
        pytest.skip("there are no kernels")
    layer = throughtime.GRU(5, 4, bidirectional=True, backend=backend).eval()
    given = arguments(layer, 6, 3)
    made = exported(Layer(layer), given, dynamo=False)
    assert {node.op_type for node in recurrent(made)} == {"GRU"}
    same(computed(made, given), Layer(layer)(*given))


class OfIds(nn.Module):
    def __init__(self, layer: nn.Module, embedding: nn.Embedding | None) -> None:
        super().__init__()
        self.layer, self.embedding = layer, embedding

    def forward(self, x):
        return self.layer(x, embedding=None if self.embedding is None else self.embedding.weight)[0]


@pytest.mark.parametrize("has_embedding", [False, True])
@pytest.mark.parametrize("exporter", ["traced", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_token_ids_are_read(has_embedding, exporter):
    embedding = nn.Embedding(7, 5) if has_embedding else None
    model = OfIds(throughtime.LSTM(5 if has_embedding else 7, 4), embedding).eval()
    made = exported(model, (torch.randint(7, (6, 3)),), EXPORTERS[exporter])
    ids = torch.randint(7, (9, 2))
    same(computed(made, (ids,)), (model(ids),))


class Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, mask):
        return self.layer(x, mask=mask)[0]


@pytest.mark.parametrize("exporter", ["traced", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_a_mask_is_read_when_the_file_runs_not_when_it_is_written(exporter):
    model = Masked(throughtime.GRU(5, 4, bidirectional=True)).eval()
    whole = torch.ones(6, 3, dtype=torch.bool)
    made = exported(model, (torch.randn(6, 3, 5), whole), EXPORTERS[exporter], axes=[{0: "T", 1: "B"}] * 2)
    for mask in (whole, torch.rand(6, 3) < 0.5, torch.rand(9, 2) < 0.5, torch.zeros(4, 1, dtype=torch.bool)):
        x = torch.randn(*mask.shape, 5)
        same(computed(made, (x, mask)), (model(x, mask),))


class Twice(nn.Module):
    """A layer that computes under autocast, whose weights are parametrized, and that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(throughtime.GRU(5, 5), "weight_hh_l0")

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(self.layer(x)[0].float())[0].float()


def test_shared_and_parametrized_layers_are_exported_under_autocast():
    model, x = Twice().eval(), torch.randn(6, 3, 5)
    made = exported(model, (x,), dynamo=False)
    assert len(recurrent(made)) == 2
    other = torch.randn(9, 2, 5)
    same(computed(made, (other,)), (model(other),), 0.05)


def test_a_single_sequence_and_lengths_of_another_type_are_exported():
    layer = throughtime.LSTM(5, 4).eval()
    model = Calling(layer, lambda layer, x: layer(x[:, 0])[0]).eval()
    x = torch.randn(6, 1, 5)
    same(computed(exported(model, (x,), dynamo=False), (x,)), (model(x),))
    model, x = Layer(layer).eval(), torch.randn(6, 3, 5)
    made = exported(model, (x, torch.tensor([6, 2, 1], dtype=torch.int32)), dynamo=False)
    given = torch.randn(9, 2, 5), torch.tensor([9, 0], dtype=torch.int32)
    same(computed(made, given), model(*given))


class Cast(nn.Module):
    """Computes in another dtype than its input and output have."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer.to(dtype), dtype

    def forward(self, x):
        return self.layer(x.to(self.dtype))[0].float()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 2e-3)])
def test_narrow_numbers_are_widened_for_the_node(dtype, tolerance):
    """ONNX Runtime has no recurrent node of bfloat16 on the CPU."""
    model, x = Cast(throughtime.GRU(5, 4), dtype).eval(), torch.randn(6, 3, 5)
    made = exported(model, (x,), dynamo=False)
    same(computed(made, (x,)), (model(x),), tolerance)


def test_float64_stays_so():
    """ONNX Runtime has no recurrent node of float64: ONNX's own evaluator computes it."""
    from onnx.reference import ReferenceEvaluator

    layer, x = throughtime.LSTM(5, 4).double().eval(), torch.randn(6, 3, 5, dtype=torch.float64)
    made = exported(Layer(layer), (x,), dynamo=False)
    found = ReferenceEvaluator(made).run(None, {"x": x.numpy()})
    same([torch.from_numpy(f) for f in found], Layer(layer)(x), 1e-12)


class Calling(nn.Module):
    """Calls a layer in a way of somebody's."""

    def __init__(self, layer: nn.Module, call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


def _packed(layer, x):
    return layer(pack_padded_sequence(x, [6, 4, 1]))[0].data


def _reset(layer, x):
    return layer(x, reset=x[:, :, 0] > 0)[0]


def _plain(layer, x):
    return layer(x)[0]


REFUSED = {
    "layer normalisation": (lambda: throughtime.GRU(5, 4, layer_norm=True), _plain, False),
    "projection": (lambda: throughtime.LSTM(5, 4, proj_size=2), _plain, False),
    "zoneout": (lambda: throughtime.LSTM(5, 4, zoneout=0.1), _plain, False),
    "recurrent dropout, which this layer has while it is in training": (
        lambda: throughtime.RNN(5, 4, recurrent_dropout=0.1),
        _plain,
        True,
    ),
    "weight drop": (lambda: throughtime.RNN(5, 4, weight_drop=0.1), _plain, True),
    "resets": (lambda: throughtime.LSTM(5, 4), _reset, False),
    "packed input; give lengths=": (lambda: throughtime.LSTM(5, 4), _packed, False),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_no_node_computes_is_refused_by_name(named):
    make, call, trains = REFUSED[named]
    model = Calling(make(), call).train(trains)
    mode = torch.onnx.TrainingMode.TRAINING if trains else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            throughtime.InputError, match=f"has no {named}|weight_drop, can't be exported; call model.eval"
        ):
            torch.onnx.export(model, (torch.randn(6, 3, 5),), io.BytesIO(), dynamo=False, training=mode)


@pytest.mark.slow
def test_it_is_refused_by_name_by_the_other_exporter_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="ONNX's LSTM has no zoneout") as failed:
            torch.onnx.export(throughtime.LSTM(5, 4, zoneout=0.1), (torch.randn(6, 3, 5),), dynamo=True)
    assert "throughtime.export_c" in str(failed.value)
