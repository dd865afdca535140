"""Models whose layers are exchanged where they are: torch.nn's for ours, and back; everything else stays as it was."""

import copy
import functools
import io
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import throughtime
from throughtime import InputError

LAYERS = {
    "rnn": (nn.RNN, throughtime.RNN, {}),
    "rnn_relu": (nn.RNN, throughtime.RNN, {"nonlinearity": "relu", "bias": False, "num_layers": 2, "dropout": 0.5}),
    "lstm": (nn.LSTM, throughtime.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm_projected": (nn.LSTM, throughtime.LSTM, {"proj_size": 3, "bias": False}),
    "gru": (nn.GRU, throughtime.GRU, {"bidirectional": True}),
    "gru_dropout_alone": (nn.GRU, throughtime.GRU, {"dropout": 0.5}),
}
pytestmark = pytest.mark.filterwarnings("ignore:dropout")


class Tagger(nn.Module):
    """Two recurrent layers and what stands around them."""

    def __init__(self, lower: nn.Module | None = None, upper: nn.Module | None = None) -> None:
        super().__init__()
        self.lower = nn.LSTM(5, 4) if lower is None else lower
        self.upper = nn.ModuleList([nn.GRU(4, 4) if upper is None else upper])
        self.output = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.upper[0](self.lower(x)[0])[0])


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_itself_goes_there_and_back(name):
    theirs, ours, options = LAYERS[name]
    layer = theirs(5, 4, **options).eval()
    x = torch.randn(6, 3, 5)
    expected, state, printed = layer(x), layer.state_dict(), repr(layer)
    before = vars(layer).copy()
    changed = throughtime.convert(layer)
    assert changed is layer
    assert type(layer) is ours
    assert vars(layer).keys() == vars(ours(5, 4, **options)).keys()
    for key, value in vars(ours(5, 4, **options)).items():
        if not isinstance(value, dict):
            assert (getattr(layer, key) == value) or key == "training", key
    torch.testing.assert_close(layer(x), expected)
    assert throughtime.to_torch(layer) is layer
    assert type(layer) is theirs
    after = vars(layer)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if key not in ("_flat_weights", "_flat_weight_refs"):
            assert after[key] is value or after[key] == value, key
    for mine, its in zip(layer._flat_weights, before["_flat_weights"], strict=True):
        assert mine is its
    assert repr(layer) == printed
    torch.testing.assert_close(layer(x), expected)
    assert layer.state_dict().keys() == state.keys()
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(x), expected)


def test_parameters_optimiser_gradients_hooks_and_flags_are_those_of_before():
    model = Tagger()
    model.lower.weight_hh_l0.requires_grad_(False)
    model.upper[0].eval()
    model.lower.register_buffer("seen", torch.tensor(3))
    model.lower.note = "kept"
    calls = []
    handle = model.lower.register_forward_hook(lambda module, given, made: calls.append(type(module)))
    model.lower.register_forward_pre_hook(lambda module, given: calls.append("before"))
    model.lower.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append(prefix))
    model.lower.register_load_state_dict_pre_hook(lambda module, *a: calls.append("load"))
    held, alive = [model.lower, *model.upper], weakref.ref(model.lower)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(6, 3, 5)
    model(x).square().sum().backward()
    peer, peer_optimiser = copy.deepcopy(model), None
    peer_optimiser = torch.optim.Adam(peer.parameters(), lr=0.01)
    for own, other in zip(model.parameters(), peer.parameters(), strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    before = {name: (id(p), p.grad, p.requires_grad) for name, p in model.named_parameters()}
    calls.clear()
    assert throughtime.convert(model) is model
    assert held == [model.lower, *model.upper]
    assert alive() is model.lower
    assert {name: (id(p), p.grad, p.requires_grad) for name, p in model.named_parameters()} == before
    assert (model.lower.training, model.upper[0].training) == (True, False)
    assert (model.lower.note, int(model.lower.seen)) == ("kept", 3)
    optimiser.step()
    peer_optimiser.step()
    same(model(x), peer(x))
    assert calls == ["before", throughtime.LSTM, "before", nn.LSTM]
    handle.remove()
    calls.clear()
    model.load_state_dict(model.state_dict())
    assert calls == ["lower.", "load"]
    model(x)
    assert calls[2:] == ["before"]
    throughtime.to_torch(model)
    optimiser.step()
    model(x).sum().backward()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _, _) in before.items()}
    assert (model.lower.note, int(model.lower.seen), type(model.lower)) == ("kept", 3, nn.LSTM)


def test_a_layer_in_two_places_and_weights_of_two_layers_stay_one():
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.GRU(4, 4), "d": nn.LSTM(4, 4), "e": nn.LSTM(4, 4)})
    model["c"].weight_hh_l0 = shared.weight_hh_l0
    model["d"].weight_ih_l0 = model["d"].weight_hh_l0
    throughtime.convert(model)
    assert model["a"] is model["b"] is shared
    assert model["c"].weight_hh_l0 is shared.weight_hh_l0
    assert model["d"].weight_ih_l0 is model["d"].weight_hh_l0
    assert {type(m) for m in model.values()} == {throughtime.GRU, throughtime.LSTM}
    x = torch.randn(6, 3, 4)
    d = model["d"](x)[0]
    throughtime.to_torch(model)
    same(d, model["d"](x)[0])
    assert model["c"]._flat_weights[1] is shared.weight_hh_l0


@pytest.mark.parametrize("how", ["spectral_norm", "weight_norm", "old weight_norm", "orthogonal"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_weights_stay_so(how):
    ways = {
        "spectral_norm": parametrizations.spectral_norm,
        "weight_norm": parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "orthogonal": parametrizations.orthogonal,
    }
    layer = ways[how](nn.LSTM(5, 4, 2), "weight_hh_l0").eval()
    twin = copy.deepcopy(layer) if how != "old weight_norm" else None
    x, keys = torch.randn(6, 3, 5), list(layer.state_dict())
    expected = layer(x)[0]
    throughtime.convert(layer)
    assert isinstance(layer, throughtime.LSTM)
    assert parametrize.is_parametrized(layer) == (how != "old weight_norm")
    same(layer(x)[0], expected)
    assert list(layer.state_dict()) == keys
    layer(x)[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    if twin is not None:
        assert isinstance(twin, nn.LSTM)  # of which the class was the same
        same(twin(x)[0], expected)
        same(copy.deepcopy(layer)(x)[0], expected)
    throughtime.to_torch(layer)
    same(layer(x)[0], expected)
    throughtime.convert(layer)
    if how == "old weight_norm":
        nn.utils.remove_weight_norm(layer, "weight_hh_l0")
    else:
        parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is throughtime.LSTM
    same(layer(x)[0], expected)
    throughtime.to_torch(layer)
    same(layer(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_devices_stay(dtype):
    model = throughtime.convert(Tagger().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    on_meta = throughtime.convert(nn.LSTM(5, 4, device="meta"))
    assert on_meta.weight_ih_l0.is_meta
    assert throughtime.to_torch(on_meta)(torch.randn(6, 3, 5, device="meta"))[0].is_meta
    assert throughtime.to_torch(model).lower._flat_weights[0].dtype == dtype


class Derived(nn.LSTM):
    """What this adds can't be told."""


def replaced_forward() -> nn.Module:
    layer = nn.LSTM(5, 4)
    layer.forward = functools.partial(nn.LSTM.forward, layer)
    return layer


def with_attribute(name: str) -> nn.Module:
    layer = nn.LSTM(5, 4)
    setattr(layer, name, 7)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Derived(5, 4), r"lower is \S*test_conversion\.Derived, derived from torch\.nn\.LSTM"),
        (
            lambda: parametrizations.spectral_norm(Derived(5, 4), "weight_hh_l0"),
            r"lower is \S*test_conversion\.Derived",
        ),
        (replaced_forward, "lower has a forward of its own"),
        (lambda: with_attribute("output_size"), "lower has an attribute 'output_size'"),
        (lambda: with_attribute("backend"), "lower has an attribute 'backend'"),
        (lambda: with_attribute("_names"), "lower has an attribute '_names'"),
    ],
)
def test_what_can_not_be_converted_is_named_and_nothing_is_changed(make, reason):
    model = Tagger()
    model.lower, model.last = make(), nn.RNN(5, 4)
    before = {name: (type(m), vars(m).copy()) for name, m in model.named_modules()}
    with pytest.raises(InputError, match=rf"^{reason}.*; leave=\['lower'\] leaves it as it is$"):
        throughtime.convert(model)
    assert {name: (type(m), vars(m)) for name, m in model.named_modules()} == before
    throughtime.convert(model, leave="lower")
    assert not isinstance(model.lower, throughtime.LSTM)
    assert (type(model.upper[0]), type(model.last)) == (throughtime.GRU, throughtime.RNN)


@pytest.mark.parametrize(
    ("layer", "mode"),
    [
        (lambda: throughtime.LSTM(5, 4, peepholes=True, coupled=True), r"LSTM\+COUPLED\+PEEPHOLES"),
        (lambda: throughtime.LSTM(5, 4, layer_norm=True), r"LSTM\+LAYER_NORM"),
        (lambda: throughtime.LSTM(5, 4, zoneout=(0.1, 0.0)), r"LSTM\+ZONEOUT"),
        (lambda: throughtime.RNN(5, 4, recurrent_dropout=0.1), r"RNN_TANH\+RECURRENT_DROPOUT"),
        (lambda: throughtime.GRU(5, 4, weight_drop=0.1), r"GRU\+WEIGHT_DROP"),
        (lambda: throughtime.GRU(5, 4, reset_after=False), "GRU_RESET_BEFORE"),
        (lambda: throughtime.MGU(5, 4), "MGU"),
    ],
)
def test_what_torch_does_not_have_is_named_and_nothing_is_changed(layer, mode):
    model = Tagger(throughtime.LSTM(5, 4), layer())
    with pytest.raises(InputError, match=rf"^upper\.0 is {mode}, which torch\.nn doesn't have; leave="):
        throughtime.to_torch(model)
    assert type(model.lower) is throughtime.LSTM
    throughtime.to_torch(model, leave=["upper.0"])
    assert type(model.lower) is nn.LSTM
    with pytest.raises(InputError, match=r"^the model, a \w+, is \S+, which torch\.nn doesn't have$"):
        throughtime.to_torch(layer())


def test_a_class_derived_from_ours_is_refused_too():
    class Mine(throughtime.GRU):
        pass

    with pytest.raises(InputError, match=r"0 is \S*test_conversion\.\S+\.Mine, derived from throughtime\.GRU"):
        throughtime.to_torch(nn.Sequential(Mine(5, 4)))
    assert isinstance(throughtime.convert(nn.Sequential(Mine(5, 4), nn.GRU(5, 4)))[1], throughtime.GRU)


def test_any_path_of_a_shared_layer_leaves_it_and_a_wrong_path_is_refused():
    shared = nn.LSTM(5, 5)
    model = nn.Sequential(shared, shared, nn.GRU(5, 5))
    throughtime.convert(model, leave=["1"])
    assert (type(shared), type(model[2])) == (nn.LSTM, throughtime.GRU)
    with pytest.raises(InputError, match="unknown module in leave 'encode'"):
        throughtime.convert(model, leave=["encode"])
    with pytest.raises(TypeError, match="model is a dict; expected"):
        throughtime.convert({})


def test_it_is_said_what_was_done_and_that_nothing_was(caplog):
    with caplog.at_level(logging.INFO, logger="throughtime"):
        model = throughtime.convert(Tagger())
        throughtime.to_torch(nn.Sequential(model))
        throughtime.convert(nn.GRU(5, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "lower: torch.nn.LSTM is now throughtime.LSTM",
        "upper.0: torch.nn.GRU is now throughtime.GRU",
        "0.lower: throughtime.LSTM is now torch.nn.LSTM",
        "0.upper.0: throughtime.GRU is now torch.nn.GRU",
        "the model: torch.nn.GRU is now throughtime.GRU",
    ]
    for change in (throughtime.convert, throughtime.to_torch):
        with pytest.warns(UserWarning, match="Sequential has no recurrent layer .* nothing was changed"):
            change(nn.Sequential(nn.Linear(5, 4)))
    throughtime.convert(throughtime.GRU(5, 4))  # done before: nothing to warn of


def test_options_that_choose_how_to_compute_are_left_behind():
    layer = throughtime.LSTM(5, 4, 2, backend="reference", recompute_every=3, dropout=0.5)
    throughtime.to_torch(layer)
    assert layer.dropout == 0.5
    with pytest.raises(TypeError, match="lengths"):
        layer(torch.randn(6, 3, 5), lengths=[1, 2, 3])
    throughtime.convert(layer)
    assert (layer.backend, layer.recompute_every, layer.dropout) == ("auto", 0, 0.5)


def test_torchs_layers_are_known_where_ours_stand_in_their_places(monkeypatch):
    layer = nn.LSTM(5, 4)
    for name in ("RNN", "LSTM", "GRU"):
        monkeypatch.setattr(nn, name, getattr(throughtime, name))
    assert type(throughtime.convert(layer)) is throughtime.LSTM
    throughtime.to_torch(layer)
    assert type(layer) is not throughtime.LSTM
    state = throughtime.stream(throughtime.LSTM(5, 4, zoneout=0.5)).step(torch.zeros(5))
    assert state.shape == (4,)


def test_a_converted_model_is_saved_and_loaded_whole():
    model, file = throughtime.convert(Tagger()), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, x = torch.load(file, weights_only=False), torch.randn(6, 3, 5)
    same(loaded(x), model(x))
    assert type(loaded.lower) is throughtime.LSTM
