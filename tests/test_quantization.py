"""torch.ao's dynamic quantisation of models that hold our layers: torch's own quantised layers, or a warning. Never in silence."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.nn.quantized import dynamic

import throughtime

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no int8 here"),
]


class Reader(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.output = layer, nn.Linear(4, 2)

    def forward(self, x):
        return self.output(self.layer(x)[0])


def quantized(model: nn.Module, *kinds: type, dtype: torch.dtype = torch.qint8) -> nn.Module:
    return quantization.quantize_dynamic(model, set(kinds) or None, dtype=dtype)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_a_layer_that_is_named_becomes_torchs_quantised_one_with_its_weights(kind, dtype, options):
    theirs = Reader(nn.Sequential(getattr(nn, kind)(5, 4, **options)))
    if options:
        theirs.output = nn.Linear(8, 2)
    ours = throughtime.convert(copy.deepcopy(theirs))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.ao leaves", UserWarning)
        made = quantized(ours, nn.Linear, getattr(throughtime, kind), dtype=dtype)
    assert type(made.layer[0]) is getattr(dynamic, kind)
    assert isinstance(ours.layer[0], getattr(throughtime, kind))
    x = torch.randn(6, 3, 5)
    expected = quantized(theirs, nn.Linear, getattr(nn, kind), dtype=dtype)
    assert torch.equal(made.layer[0](x)[0], expected.layer[0](x)[0])


@pytest.mark.parametrize("kinds", [(), (nn.LSTM,), (nn.Linear,)])
def test_a_layer_that_is_not_named_stays_in_float_with_a_warning(kinds):
    model, x = Reader(throughtime.LSTM(5, 4)), torch.randn(6, 3, 5)
    with pytest.warns(
        UserWarning, match="throughtime.LSTM in float, since it wasn't asked for: name throughtime.LSTM in"
    ):
        made = quantized(model, *kinds)
    torch.testing.assert_close(made.layer(x), model.layer(x))
    assert not hasattr(made.layer, "qconfig") or made.layer.qconfig is None
    assert type(quantized(throughtime.to_torch(model), nn.LSTM).layer) is dynamic.LSTM


def test_ours_in_torchs_place_is_quantised_by_default(monkeypatch):
    for kind in ("LSTM", "GRU"):
        monkeypatch.setattr(nn, kind, getattr(throughtime, kind))
        made = quantized(Reader(getattr(nn, kind)(5, 4)))
        assert type(made.layer) is getattr(dynamic, kind)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: throughtime.LSTM(5, 4, peepholes=True), r"it is LSTM\+PEEPHOLES, and torch\.ao has LSTM and GRU"),
        (lambda: throughtime.GRU(5, 4, zoneout=0.1), r"it is GRU\+ZONEOUT"),
        (lambda: throughtime.RNN(5, 4), "it is RNN_TANH"),
        (lambda: throughtime.MGU(5, 4), "it is MGU"),
        (lambda: throughtime.LSTM(5, 4, proj_size=3), "no projection"),
        (lambda: throughtime.GRU(5, 4, bias=False), "this one has none"),
        (lambda: throughtime.GRU(5, 4).double(), r"it is torch\.float64"),
        (lambda: nn.utils.parametrizations.spectral_norm(throughtime.GRU(5, 4), "weight_hh_l0"), "parametrized"),
    ],
)
def test_what_torch_has_no_quantised_layer_for_stays_in_float_with_the_reason(layer, reason):
    model = Reader(layer())
    kind = nn.utils.parametrize.type_before_parametrizations(model.layer)
    with pytest.warns(UserWarning, match=reason):
        made = quantized(model, nn.Linear, kind)
    assert isinstance(made.layer, kind)
    assert type(made.output) is dynamic.Linear
    x = torch.randn(6, 3, 5, dtype=model.layer.weight_ih_l0.dtype)
    torch.testing.assert_close(made.layer(x)[0], model.layer.eval()(x)[0])


def test_static_quantisation_warns():
    model = Reader(throughtime.LSTM(5, 4)).eval()
    model.qconfig = quantization.default_qconfig
    with pytest.warns(UserWarning, match="no static quantisation of it: quantise throughtime.to_torch"):
        quantization.prepare(model, inplace=True)
    assert model.layer.qconfig is None
