"""What code that knows torch.nn's layers reads of ours, and sets: torch.nn's own answers, and pickles of its layers."""

import copy
import io
import pickle
from abc import ABC

import pytest
import torch
from comparison import BACKENDS, HAS_NATIVE
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime
from throughtime.backend import native
from throughtime.request import Direction, Request
from throughtime.rnn_base import FlatWeights

PAIRS = {
    "rnn": (throughtime.RNN, nn.RNN, {}),
    "rnn_relu": (throughtime.RNN, nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "lstm": (throughtime.LSTM, nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm_projected": (throughtime.LSTM, nn.LSTM, {"proj_size": 3, "bidirectional": True, "bias": False}),
    "gru": (throughtime.GRU, nn.GRU, {"batch_first": True, "num_layers": 2, "dropout": 0.25}),
}
OF_NAMES = (
    "mode",
    "_flat_weights_names",
    "_all_weights",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)
OF_SIZES = ("input_size", "hidden_size", "num_layers")


def pair(name: str):
    ours, theirs, options = PAIRS[name]
    theirs = theirs(5, 4, **options)
    ours = ours(5, 4, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def answer(call):
    """What a call returns, or how it fails."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", PAIRS)
def test_attributes_answer_as_torchs(name):
    ours, theirs = pair(name)
    assert isinstance(ours, nn.RNNBase)
    for attribute in (*OF_NAMES, *OF_SIZES):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for mine, its in zip(ours._flat_weights, theirs._flat_weights, strict=True):
        assert type(mine) is nn.Parameter
        assert torch.equal(mine, its)
    assert [[w.shape for w in row] for row in ours.all_weights] == [
        [w.shape for w in row] for row in theirs.all_weights
    ]
    if isinstance(theirs, nn.RNN):
        assert ours.nonlinearity == theirs.nonlinearity
    missing = [a for a in vars(theirs) if not hasattr(ours, a) and a != "_flat_weight_refs"]
    assert not missing
    public = [a for a in dir(theirs) if not hasattr(ours, a) and a not in ("_flat_weight_refs", "__annotations__")]
    assert not public


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(6, 3, 5), (6, 3, 4), (6, 5), (3, 6, 5)])
@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([3, 2])])
def test_checks_answer_as_torchs(name, shape, batch_sizes):
    ours, theirs = pair(name)
    x, order = torch.randn(shape), torch.tensor([2, 0, 1])
    for hidden in (torch.randn(2, 3, 4), torch.randn(4, 3, 4), torch.randn(2, 3, 3)):
        hx = (hidden, torch.randn(2, 3, 4)) if isinstance(theirs, nn.LSTM) else hidden
        for call in (
            lambda layer: layer.check_input(x, batch_sizes),
            lambda layer: layer.check_input(x.double(), batch_sizes),
            lambda layer: layer.get_expected_hidden_size(x, batch_sizes),
            lambda layer, hx=hx: layer.check_forward_args(x, hx, batch_sizes),
            lambda layer, h=hidden: layer.check_hidden_size(h, layer.get_expected_hidden_size(x, batch_sizes)),
            lambda layer, h=hidden: layer.check_hidden_size(h, (1, 2, 3), "got {1}, not {0}"),
            lambda layer, hx=hx: [h.tolist() for h in layer.permute_hidden(hx, order)],
            lambda layer, hx=hx: layer.permute_hidden(hx, None) is hx,
            lambda layer: layer.flatten_parameters(),
            lambda layer: (layer._update_flat_weights(), layer._init_flat_weights(), layer._weights_have_changed())[2],
        ):
            assert answer(lambda call=call: call(ours)) == answer(lambda call=call: call(theirs))
    if isinstance(theirs, nn.LSTM):
        assert ours.get_expected_cell_size(x, batch_sizes) == theirs.get_expected_cell_size(x, batch_sizes)


@pytest.mark.parametrize(
    ("layer", "mode"),
    [
        (throughtime.LSTM(5, 4, peepholes=True, zoneout=(0.0, 0.5)), "LSTM+PEEPHOLES+ZONEOUT"),
        (throughtime.LSTM(5, 4, zoneout=(0.0, 0.0)), "LSTM"),
        (throughtime.RNN(5, 4, layer_norm=True), "RNN_TANH+LAYER_NORM"),
        (throughtime.GRU(5, 4, weight_drop=0.5), "GRU+WEIGHT_DROP"),
        (throughtime.GRU(5, 4, reset_after=False), "GRU_RESET_BEFORE"),
        (throughtime.MGU(5, 4), "MGU"),
    ],
)
def test_the_mode_of_what_torch_does_not_compute_is_none_of_torchs(layer, mode):
    assert layer.mode == mode
    copied = pickle.loads(pickle.dumps(layer))
    assert copied.mode == mode
    assert copied.state_dict().keys() == layer.state_dict().keys()


def test_a_set_nonlinearity_or_mode_is_what_is_computed():
    x, relu = torch.randn(6, 3, 5), nn.RNN(5, 4, nonlinearity="relu")
    ours = throughtime.RNN(5, 4)
    ours.load_state_dict(relu.state_dict())
    assert not torch.allclose(ours(x)[0], relu(x)[0])
    ours.nonlinearity = "relu"
    torch.testing.assert_close(ours(x)[0], relu(x)[0])
    assert ours.mode == "RNN_RELU"
    ours.mode = "RNN_TANH"
    assert ours.nonlinearity == "tanh"
    with pytest.raises(throughtime.InputError, match="unknown nonlinearity 'rel'"):
        ours.nonlinearity = "rel"
    normed = throughtime.RNN(5, 4, layer_norm=True)
    normed.nonlinearity = "relu"
    assert normed.cell == "rnn_relu+layer_norm"
    with pytest.raises(ValueError, match="mode = 'GRU'; this layer is 'LSTM', which can't be changed"):
        throughtime.LSTM(5, 4).mode = "GRU"


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_only_an_lstm_has_a_projection(kind, proj_size):
    for module in (nn, throughtime):
        with pytest.raises(ValueError, match="proj_size"):
            getattr(module, kind)(5, 4, proj_size=proj_size)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("way", ["list", "item"])
def test_flat_weights_that_are_set_are_computed_with(name, way):
    ours, theirs = pair(name)
    others = [nn.Parameter(torch.randn_like(w)) for w in theirs._flat_weights]
    for layer in (ours, theirs):
        if way == "list":
            layer._flat_weights = list(others)
        else:
            for index, weight in enumerate(others):
                layer._flat_weights[index] = weight
    x = torch.randn(6, 3, 5)
    for name_, weight in zip(theirs._flat_weights_names, others, strict=True):
        setattr(theirs, name_, weight)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    assert dict(ours.named_parameters())["weight_hh_l0"] is others[1]


def test_a_plain_tensor_in_place_of_a_parameter_is_refused_instead_of_ignored():
    layer = throughtime.LSTM(5, 4)
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight_ih_l0'"):
        layer._flat_weights[0] = torch.zeros(16, 5)
    del layer.weight_hh_l0  # as fastai's and AWD-LSTM's weight drop do
    assert layer._flat_weights[1] is None
    layer.weight_hh_l0 = dropped = torch.zeros(16, 4)
    assert layer._flat_weights[1] is dropped
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    layer._flat_weights[1] = other = torch.ones(16, 4)
    assert layer.weight_hh_l0 is other


def test_flat_weights_of_a_parametrized_layer_may_be_set_to_what_they_are():
    layer = torch.nn.utils.parametrizations.spectral_norm(throughtime.GRU(5, 4), "weight_hh_l0").eval()
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    assert isinstance(layer._flat_weights, FlatWeights)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pickle_of_torchs_layer_is_loaded_where_ours_stands_in_its_place(name, monkeypatch):
    ours, theirs, options = PAIRS[name]
    layer = theirs(5, 4, **options).eval()
    layer.weight_hh_l0.requires_grad_(False)
    layer.note = "kept"
    file = io.BytesIO()
    torch.save(layer, file)
    x = torch.randn(6, 3, 5)
    expected = layer(x)[0]
    monkeypatch.setattr(nn.modules.rnn, theirs.__name__, ours)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is ours
    torch.testing.assert_close(loaded(x)[0], expected)
    assert (loaded.note, loaded.training, loaded.weight_hh_l0.requires_grad) == ("kept", False, False)
    assert vars(loaded).keys() == vars(ours(5, 4, **options)).keys() | {"note"}
    assert repr(loaded) == repr(ours(5, 4, **options))
    again = copy.deepcopy(loaded)
    torch.testing.assert_close(again(x)[0], expected)


def test_a_pickle_of_an_old_torch_has_no_projection_and_other_lists():
    layer = nn.LSTM(5, 4, bidirectional=True)
    state = layer.__getstate__()
    del state["proj_size"]
    state["all_weights"] = state.pop("_all_weights")
    ours = throughtime.LSTM.__new__(throughtime.LSTM)
    ours.__setstate__(state)
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(ours(x)[0], layer(x)[0])
    with pytest.raises(ValueError, match="mode = None"):
        ours.__setstate__({"hidden_size": 4})


def test_a_class_that_mixes_torchs_base_with_ours_works(monkeypatch):
    """As pytorch-forecasting's, whose LSTM is its own RNN, of nn.RNNBase, and nn.LSTM."""
    theirs = nn.LSTM(5, 4, 2)
    monkeypatch.setattr(nn, "LSTM", throughtime.LSTM)

    class Rnn(ABC, nn.RNNBase):
        def init_hidden_state(self, x):
            return torch.zeros(self.num_layers, x.shape[1], self.hidden_size)

        def forward(self, x, hx=None, lengths=None, enforce_sorted=True):
            if lengths is None:
                return super().forward(x, hx=hx)
            packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
            return super().forward(packed, hx=hx)

    class Lstm(Rnn, nn.LSTM):
        pass

    layer = Lstm(input_size=5, hidden_size=4, num_layers=2)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 3, 5)
    zeros = layer.init_hidden_state(x)
    torch.testing.assert_close(layer(x, (zeros, zeros))[0], theirs(x)[0])
    torch.testing.assert_close(layer(x, lengths=torch.tensor([6, 2, 1]))[0].data.shape, torch.Size([9, 4]))


@pytest.mark.slow
def test_the_common_base_does_not_keep_a_layer_from_being_compiled():
    """torch.compile refuses nn.RNN, nn.LSTM and nn.GRU by class, and not the base that they share with ours."""
    torch.compiler.reset()
    layer = throughtime.LSTM(5, 4)
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x)[0], layer(x)[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(nn.LSTM(5, 4), fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"num_layers": 2}, "num_layers", 1),
        ({}, "num_layers", 2),
        ({"bidirectional": True}, "bidirectional", False),
        ({}, "bidirectional", True),
        ({}, "bias", False),
        ({"bias": False}, "bias", True),
    ],
)
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_field_that_is_set_against_the_parameters_is_refused(options, field, value, has_gradient):
    layer = throughtime.LSTM(5, 4, **options)
    setattr(layer, field, value)
    said = f"{field} = {value}.*the layer was made with parameters weight_ih_l0 … .*; make a new layer"
    with torch.set_grad_enabled(has_gradient), pytest.raises(throughtime.InputError, match=said):
        layer(torch.randn(6, 3, 5))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "MGU"])
@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_is_set_to_none_counts_as_zeros(kind, name, backend):
    if backend == "torch" and kind == "MGU":
        pytest.skip("torch has no such layer")
    layer, x = getattr(throughtime, kind)(5, 4, backend=backend), torch.randn(6, 3, 5)
    other = copy.deepcopy(layer)
    nn.init.zeros_(getattr(other, name))
    setattr(layer, name, None)
    expected = other(x)[0]
    torch.testing.assert_close(layer(x)[0], expected)
    leaves = layer.weight_ih_l0, other.weight_ih_l0
    found, exact = (torch.autograd.grad(m(x)[0].sum(), w)[0] for m, w in zip((layer, other), leaves, strict=True))
    torch.testing.assert_close(found, exact)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x)[0], expected)


@pytest.mark.parametrize("name", ["gain_ih_l0", "gain_c_l0", "shift_c_l0", "weight_ch_l0"])
@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("kind", [throughtime.LSTM, throughtime.LSTMCell])
def test_a_variants_parameter_that_is_set_to_none_is_refused(kind, name, has_gradient):
    module, x = kind(5, 4, layer_norm=True, peepholes=True), torch.randn(3, 5)
    plain = name.removesuffix("_l0")
    setattr(module, plain if kind is throughtime.LSTMCell else name, None)
    said = f"{plain} is None; expected a tensor, since a lstm.* has it"
    with torch.set_grad_enabled(has_gradient), pytest.raises(TypeError, match=said):
        module(x)


@pytest.mark.parametrize("way", ["", "_reverse"])
def test_biases_of_one_direction_that_are_set_to_none_count_as_zeros(way):
    layer, x = throughtime.GRU(5, 4, bidirectional=True), torch.randn(6, 3, 5)
    other = copy.deepcopy(layer)
    for name in (f"bias_ih_l0{way}", f"bias_hh_l0{way}"):
        nn.init.zeros_(getattr(other, name))
        setattr(layer, name, None)
    found, exact = (torch.autograd.grad(m(x)[0].sum(), m.weight_ih_l0_reverse)[0] for m in (layer, other))
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(layer(x)[0], other(x)[0])


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias_ih": None}, "one of bias_ih and bias_hh is given"),
        ({"gain_hh": None}, "gain_hh is None; expected a tensor"),
        ({"bias_ih": None, "bias_hh": None}, "the reverse pass has .*; expected "),
    ],
)
def test_kernels_refuse_parameters_that_are_not_all_there(change, said):
    layer, x, h = throughtime.GRU(5, 4, bidirectional=True, layer_norm=True), torch.randn(6, 3, 5), torch.zeros(3, 4)
    first, second = (Direction((h,), p, reverse=way) for p, way in zip(layer._weights(), (False, True), strict=True))
    second = second._replace(parameters=second.parameters._replace(**change))
    with pytest.raises((TypeError, ValueError), match=said):
        native.forward(Request(layer._spec, x, (first, second)), keep=True)
