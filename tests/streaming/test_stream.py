"""Streams against the layers: the same bits in float32, step by step, in pieces or at once, alone or among others."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from comparison import HAS_NATIVE
from torch import nn

import throughtime
from throughtime import GRU, LSTM, MGU, RNN, InputError
from throughtime.kernels import native
from throughtime.streaming import engine

pytestmark = pytest.mark.skipif(native.module is None, reason="streams need the kernels")

T = 70  # more than one piece passes a stage at once
LAYERS = {
    "rnn": lambda i, h, **o: RNN(i, h, **o),
    "rnn_relu": lambda i, h, **o: RNN(i, h, nonlinearity="relu", **o),
    "lstm": lambda i, h, **o: LSTM(i, h, **o),
    "lstm_projected": lambda i, h, **o: LSTM(i, h, proj_size=max(1, h // 2), **o) if h > 1 else LSTM(i, h, **o),
    "gru": lambda i, h, **o: GRU(i, h, **o),
    "gru_reset_before": lambda i, h, **o: GRU(i, h, reset_after=False, **o),
    "mgu": lambda i, h, **o: MGU(i, h, **o),
}
VARIANTS = {
    "rnn": [{"layer_norm": True}, {"zoneout": 0.3}],
    "rnn_relu": [{"layer_norm": True, "zoneout": 0.1}],
    "lstm": [
        {"layer_norm": True},
        {"peepholes": True},
        {"coupled": True},
        {"zoneout": (0.3, 0.1)},
        {"peepholes": True, "coupled": True, "layer_norm": True, "zoneout": 0.2},
    ],
    "lstm_projected": [
        {"layer_norm": True, "peepholes": True, "zoneout": (0.0, 0.2)},
        {"coupled": True},
        {"layer_norm": True, "coupled": True, "bias": False},
    ],
    "gru": [{"layer_norm": True}, {"zoneout": 0.5}],
    "gru_reset_before": [{"layer_norm": True}, {"zoneout": 0.5, "layer_norm": True}, {"zoneout": 0.5}],
    "mgu": [{"layer_norm": True}, {"zoneout": 0.5, "layer_norm": True}, {"zoneout": 0.5}],
}
SIZES = [(1, 1), (3, 5), (7, 16), (19, 33), (64, 64), (130, 67), (5, 200)]
ALL = [
    pytest.param(name, options, id="-".join([name, *options]))
    for name in LAYERS
    for options in [{}, {"bias": False}, *VARIANTS[name]]
]


def made(name, inputs, hidden, **options):
    layer = LAYERS[name](inputs, hidden, **options)
    with torch.no_grad():  # biases that differ, and gains that aren't ones
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


def run(layer, x):
    with torch.no_grad():
        return layer(x)[0]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_stream_has_the_bits_of_the_layer(name, options, sizes):
    layer = made(name, *sizes, num_layers=2, **options)
    x = torch.randn(T, sizes[0])
    expected = run(layer, x)
    stream = throughtime.stream(layer)
    assert torch.equal(stream.feed(x), expected)
    stream.reset()
    assert torch.equal(torch.stack([stream.step(row) for row in x]), expected)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_many_streams_have_the_bits_of_the_layer(name, options):
    layer = made(name, 9, 37, **options)
    x = torch.randn(11, 100, 9)
    expected = run(layer, x)
    for threads in (1, 2):
        many = throughtime.stream(layer, streams=100, threads=threads)
        assert torch.equal(many.feed(x), expected)
        many.reset()
        assert torch.equal(torch.stack([many.step(row) for row in x]), expected)


@pytest.fixture(params=native.instruction_sets() if HAS_NATIVE else [])
def instruction_set(request):
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield
    native.use_instruction_set(before)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_neighbours_and_cuts_change_no_bit(name, precision):
    layer = made(name, 9, 37)
    model = nn.Sequential(layer, nn.Linear(layer.output_size, 21))
    x = np.random.default_rng(0).standard_normal((50, 60, 9), np.float32)
    many = throughtime.stream(model, streams=60, precision=precision)
    expected = many.feed(x)
    one = throughtime.stream(model, precision=precision)
    assert np.array_equal(one.feed(x[:, 7]), expected[:, 7])
    cut = one.clone()
    cut.reset()
    pieces = [cut.feed(piece) for piece in np.split(x[:, 7], [1, 4, 4, 37])]
    assert np.array_equal(np.concatenate(pieces), expected[:, 7])
    # subsets in any order, each stream at a pace of its own
    many.reset()
    random, place, found = np.random.default_rng(1), np.zeros(60, int), np.zeros_like(expected)
    while (left := np.flatnonzero(place < 50)).size:
        which = random.permutation(left)[: random.integers(1, 61)]
        y = many.step(x[place[which], which], which=which)
        found[place[which], which] = y
        place[which] += 1
    assert np.array_equal(found, expected)


def test_bfloat16_has_the_bits_of_the_layer_in_bfloat16():
    for name in LAYERS:
        layer = made(name, 33, 47).bfloat16()
        x = torch.randn(T, 33).bfloat16()
        found = throughtime.stream(layer, precision="bfloat16").feed(x)
        assert torch.equal(found.bfloat16(), run(layer, x)), name


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.02), ("int8", 0.03)])
def test_narrow_weights_are_near(name, precision, most):
    layer = made(name, 40, 150)
    x = torch.randn(200, 40)
    expected, found = run(layer, x), throughtime.stream(layer, precision=precision).feed(x)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < most


def multiplied(weight, x, precision):
    rows, columns = x.shape[0], weight.shape[0]
    weights = native.module.StreamWeights(precision)
    weights.add_linear(weight.ctypes.data, 0, columns, weight.shape[1])
    out = np.full((rows, columns), np.nan, np.float32)
    weights.multiply(rows, x.ctypes.data, out.ctypes.data)
    return out


def quantised(rows):
    largest = np.abs(rows).max(1, keepdims=True)
    return np.rint(rows * (np.float32(127) / largest)).astype(np.int64), largest / np.float32(127)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 5, 3), (2, 64, 70), (1, 513, 130), (7, 257, 64), (61, 100, 300), (1, 1024, 4096)]
)
def test_int8_is_a_product_of_integers(shape):
    """Rounded to the nearest of 127 steps, summed exactly, on every CPU alike."""
    rows, depth, columns = shape
    random = np.random.default_rng(0)
    weight = random.standard_normal((columns, depth), np.float32)
    x = random.standard_normal((rows, depth), np.float32)
    (q, of_x), (p, of_weight) = quantised(x), quantised(weight)
    expected = (of_x * of_weight.T) * (q @ p.T).astype(np.float32)
    assert np.array_equal(multiplied(weight, x, "int8"), expected)


def test_every_instruction_set_sums_the_same_integers():
    random = np.random.default_rng(0)
    weight, x = random.standard_normal((130, 77), np.float32), random.standard_normal((9, 77), np.float32)
    before, found = native.instruction_set(), []
    try:
        for name in native.instruction_sets():
            native.use_instruction_set(name)
            found.append(multiplied(weight, x, "int8"))
    finally:
        native.use_instruction_set(before)
    assert all(np.array_equal(other, found[0]) for other in found)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_hides_no_number_that_is_none(bad):
    weight, x = np.ones((3, 5), np.float32), np.ones((2, 5), np.float32)
    x[1, 3] = bad
    found = multiplied(weight, x, "int8")
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    weight[2, 0] = bad
    assert np.isnan(multiplied(weight, np.ones((1, 5), np.float32), "int8")).tolist() == [[False, False, True]]
    nothing = np.full((1, 5), 1e-40, np.float32)
    assert np.array_equal(multiplied(np.ones((3, 5), np.float32), nothing, "int8"), np.zeros((1, 3), np.float32))


def embedded(vocabulary, width, cell, hidden):
    layer = made(cell, width, hidden)
    return nn.Sequential(
        nn.Embedding(vocabulary, width), layer, nn.Dropout(0.5), nn.Linear(layer.output_size, vocabulary)
    )


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_token_ids_through_an_embedding(name, has_table, monkeypatch):
    if not has_table:
        monkeypatch.setattr("throughtime.streaming.engine._LARGEST_TABLE", 0)
    model = embedded(300, 12, name, 20)
    ids = torch.randint(300, (T,))
    with torch.no_grad():
        h = model[1](ids, embedding=model[0].weight)[0]
        expected = model[3](h)
    stream = throughtime.stream(model)
    found = stream.feed(ids)
    assert torch.allclose(found, expected, atol=1e-5)
    stream.reset()
    stepped = np.stack([stream.step(token) for token in ids.tolist()])
    assert np.array_equal(stepped, found.numpy())
    bare = throughtime.stream(nn.Sequential(*model[:2]))
    assert torch.equal(bare.feed(ids), h)  # T < V: the layer multiplies the tokens' own rows
    many = throughtime.stream(model, streams=3)
    together = many.feed(ids[:69].view(23, 3))
    alone = throughtime.stream(model)
    assert torch.equal(alone.feed(ids[:69].view(23, 3)[:, 1]), together[:, 1])


@pytest.mark.parametrize("name", LAYERS)
def test_token_ids_as_one_hot_vectors(name):
    layer = made(name, 50, 33)
    ids = torch.randint(50, (T,))
    stream = throughtime.stream(layer, ids=True)
    assert torch.equal(stream.feed(ids), run(layer, ids))
    many = throughtime.stream(layer, ids=True, streams=70)
    batch = torch.randint(50, (9, 70))
    assert torch.equal(many.feed(batch), run(layer, batch))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_layers_of_torch(kind):
    layer = kind(6, 11, num_layers=2)
    x = torch.randn(T, 6)
    with torch.no_grad():
        expected = layer(x)[0]
    assert torch.allclose(throughtime.stream(layer).feed(x), expected, atol=1e-5)


def test_several_linear_layers_and_last():
    layer = made("lstm", 6, 11)
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(11, 8, bias=False), nn.Linear(8, 200))
    x = torch.randn(T, 4)
    with torch.no_grad():
        expected = model[3](model[2](layer(model[0](x))[0]))
    stream = throughtime.stream(model)
    whole = stream.feed(x)
    assert torch.allclose(whole, expected, atol=1e-5)
    state = stream.state()
    stream.reset()
    assert torch.equal(stream.feed(x, last=True), whole[-1])
    assert stream.state() == state
    many = throughtime.stream(model, streams=100)
    x = torch.randn(5, 100, 4)
    whole = many.feed(x)
    many.reset()
    assert torch.equal(many.feed(x, last=True), whole[-1])
    bare = throughtime.stream(layer)
    y = torch.randn(T, 6)
    whole = bare.feed(y)
    bare.reset()
    assert torch.equal(bare.feed(y, last=True), whole[-1])


def test_long_feeds_are_cut_for_signals_alone():
    layer = made("gru", 4, 512)
    x = torch.randn(6000, 4)  # three parts
    whole = run(layer, x)
    assert torch.equal(throughtime.stream(layer).feed(x), whole)
    assert torch.equal(throughtime.stream(layer).feed(x, last=True), whole[-1])


def test_a_call_that_is_refused_changes_no_state():
    stream = throughtime.stream(made("gru", 9, 4), ids=True, streams=2)
    before = stream.state()
    for call, error in [
        (lambda: stream.feed([[1, 2], [3, 4], [5, 9]]), IndexError),
        (lambda: stream.feed([[1, 2], [3, 4], [5, -1]]), IndexError),
        (lambda: stream.feed([[1, 2], [3, 4]], which=[1, 1]), ValueError),
        (lambda: stream.feed([[1, 2], [3, 4]], which=[0, 2]), IndexError),
    ]:
        with pytest.raises(error, match=r"token id (9|-1); expected one from 0 to 8|which\[1\]"):
            call()
        assert stream.state() == before


def test_a_snapshot_is_taken():
    layer = made("lstm", 4, 9)
    x = torch.randn(10, 4)
    before = run(layer, x)
    stream = throughtime.stream(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    del layer
    assert torch.equal(stream.feed(x), before)


def test_what_comes_in_comes_out():
    stream = throughtime.stream(made("gru", 3, 4))
    assert isinstance(stream.step(torch.zeros(3)), torch.Tensor)
    assert isinstance(stream.step(torch.zeros(3, dtype=torch.float64)), torch.Tensor)
    assert isinstance(stream.step(np.zeros(3, np.float32)), np.ndarray)
    first = stream.clone()
    y = stream.step([0.5, 1.0, 2.0])
    assert y.dtype == np.float32
    strided = np.array([0.5, 0, 1.0, 0, 2.0, 0], np.float32)[::2]
    assert np.array_equal(first.clone().step(strided), y)
    reverse = torch.tensor([2.0, 1.0, 0.5]).flip(0)
    assert np.array_equal(first.clone().step(reverse).numpy(), y)
    assert first.clone().feed(np.zeros((0, 3))).shape == (0, 4)
    many = throughtime.stream(made("gru", 3, 4), streams=5)
    assert many.step(torch.zeros(2, 3), which=torch.tensor([4, 1])).shape == (2, 4)
    assert many.step(torch.zeros(3), which=2).shape == (4,)
    assert many.step(np.zeros((0, 3)), which=[]).shape == (0, 4)
    assert many.feed(np.zeros((7, 2, 3)), which=np.array([True, False, False, True, False])).shape == (7, 2, 4)
    assert repr(many) == "<throughtime 5 streams, float32: 3 numbers to 4>"


def test_resets_are_of_the_streams_that_are_named():
    layer = made("lstm", 3, 8)
    many = throughtime.stream(layer, streams=4)
    x = torch.randn(6, 4, 3)
    many.feed(x)
    many.reset([2, 0])
    found = many.feed(x)
    reset = torch.zeros(12, 4, dtype=torch.bool)
    reset[6, [0, 2]] = True
    with torch.no_grad():
        expected = layer(torch.cat([x, x]), reset=reset)[0][6:]
    assert torch.equal(found, expected)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, input):
        return self.head(self.rnn(input)[0])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: LSTM(3, 4, bidirectional=True), "bidirectional"),
        (lambda: nn.Linear(3, 4), "no recurrent layer"),
        (lambda: LSTM(3, 4, dtype=torch.float64), r"expected model.float\(\)"),
        (lambda: LSTM(3, 4, device="meta"), "meta"),
        (lambda: nn.Sequential(LSTM(3, 4), nn.ReLU()), "can't stream ReLU"),
        (lambda: nn.Sequential(LSTM(3, 4), nn.Linear(5, 2)), "reads 5 numbers"),
        (lambda: nn.Sequential(nn.Embedding(9, 3, max_norm=1.0), LSTM(3, 4)), "max_norm"),
        (lambda: nn.Sequential(LSTM(3, 4), nn.Embedding(9, 3)), "can't stream Embedding"),
        (lambda: "a layer", "str"),
        (lambda: Tagger(), r"can't stream Tagger; .* give nn.Sequential\(model.rnn, model.head\)"),
    ],
)
def test_what_cannot_be_streamed_is_refused(model, said):
    with pytest.raises(InputError, match=said) as caught:
        throughtime.stream(model())
    assert "\n" not in str(caught.value)


def changed(module, **parameters):
    """A module whose parameters somebody has put others in place of."""
    for name, tensor in parameters.items():
        module._parameters[name] = None if tensor is None else nn.Parameter(tensor)
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: changed(LSTM(3, 4), bias_hh_l0=torch.zeros(2)), r"bias_hh in layer 0 of shape \[2\]; expected \[16\]"),
        (lambda: changed(LSTM(3, 4), weight_hh_l0=torch.zeros(16, 9)), r"weight_hh in layer 0 .*; expected \[16, 4\]"),
        (
            lambda: changed(LSTM(3, 4, num_layers=2), weight_ih_l1=torch.zeros(0)),
            r"weight_ih in layer 1 of shape \[0\]",
        ),
        (lambda: changed(nn.GRU(3, 4), bias_ih_l0=torch.zeros(12, 1)), r"bias_ih in layer 0 .*; expected \[12\]"),
        (lambda: changed(LSTM(3, 4, proj_size=2), weight_hr_l0=torch.zeros(4, 2)), r"weight_hr .*; expected \[2, 4\]"),
        (lambda: changed(LSTM(3, 4, peepholes=True), weight_ch_l0=torch.zeros(1)), r"weight_ch .*; expected \[12\]"),
        (lambda: changed(LSTM(3, 4, layer_norm=True), gain_c_l0=torch.zeros(3)), r"gain_c .*; expected \[4\]"),
        (lambda: changed(LSTM(3, 4), weight_hh_l0=None), "a weight that is None"),
        (lambda: nn.Sequential(LSTM(3, 4), changed(nn.Linear(4, 9), bias=torch.zeros(1))), r"bias .*; expected \[9\]"),
        (lambda: nn.Sequential(LSTM(3, 4), changed(nn.Linear(4, 4), weight=torch.zeros(16))), r"a weight \[16\]"),
        (lambda: nn.Sequential(LSTM(3, 4), changed(nn.Linear(4, 4), weight=None)), "a weight that is None"),
        (lambda: nn.Sequential(LSTM(3, 4), changed(nn.Linear(4, 4), weight=torch.eye(4).to_sparse())), "a dense one"),
        (lambda: nn.Sequential(changed(nn.Embedding(9, 3), weight=torch.zeros(9, 3, 3)), LSTM(3, 4)), "2 dimensions"),
        (lambda: nn.Sequential(LSTM(3, 4), nn.LazyLinear(2)), "LazyLinear has no weights yet"),
    ],
)
def test_weights_that_do_not_fit_each_other_are_refused(module, said):
    with pytest.raises(InputError, match=said):
        throughtime.stream(module())


class Drawn(nn.Module):
    """A parametrisation that drops weights while training, and counts how often it has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("draws", torch.zeros(()))

    def forward(self, weight):
        if self.training:
            self.draws += 1
        return nn.functional.dropout(weight, 0.5, self.training)


@pytest.mark.parametrize("part", ["0.weight", "1.weight_hh_l0", "2.weight"])
def test_parametrisations_are_read_as_in_eval_and_left_as_they_were(part):
    model = nn.Sequential(nn.Embedding(9, 3), LSTM(3, 20), nn.Linear(20, 9))
    expected = throughtime.stream(model).feed([1, 2, 3])
    place, name = part.split(".")
    nn.utils.parametrize.register_parametrization(model[int(place)], name, Drawn())
    (drawn,) = (module for module in model.modules() if isinstance(module, Drawn))
    before = drawn.draws.clone()
    assert np.array_equal(throughtime.stream(model).feed([1, 2, 3]), expected)
    assert drawn.training
    assert torch.equal(drawn.draws, before)


class Louder(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class LouderDropout(nn.Dropout):
    def forward(self, input):
        return 2 * super().forward(input)


def model_of(place, change):
    """A model whose module at a place has been changed."""
    parts = {"embedding": nn.Embedding(9, 3), "layer": LSTM(3, 4), "dropout": nn.Dropout(), "linear": nn.Linear(4, 2)}
    model = nn.Sequential(*parts.values())
    change(model if place == "model" else parts[place])
    return model


@pytest.mark.parametrize("place", ["embedding", "layer", "dropout", "linear", "model"])
def test_what_changes_a_module_is_refused(place):
    for change, said in [
        (lambda module: module.register_forward_hook(lambda *_: None), "forward hooks"),
        (lambda module: module.register_forward_pre_hook(lambda *_: None), "forward hooks"),
        (lambda module: setattr(module, "forward", lambda input: input), "a forward of its own"),
    ]:
        with pytest.raises(InputError, match=said):
            throughtime.stream(model_of(place, change))


@pytest.mark.parametrize("changed", [Louder(4, 2), LouderDropout()])
def test_a_class_that_changes_what_is_computed_is_refused(changed):
    with pytest.raises(InputError, match=type(changed).__name__):
        throughtime.stream(nn.Sequential(LSTM(3, 4), changed))


class Staged(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = stages


def test_stages_of_another_meaning_are_no_list_of_layers():
    for stages in (nn.ModuleList([LSTM(3, 4)]), nn.Sequential(LSTM(3, 4)), 4):
        with pytest.raises(InputError, match="can't stream Staged"):
            throughtime.stream(Staged(stages))
    with pytest.raises(InputError, match=r"stages\(\) returned int; expected the model's layers"):
        throughtime.stream(Staged(lambda: 4))


def test_what_lists_its_layers_itself_is_plain_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = GRU(3, 4)

        def stages(self):
            return [self.layer]

    model = Own()
    assert throughtime.stream(model).output_size == 4
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="Own has forward hooks"):
        throughtime.stream(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, "int4"),
        ({"streams": 0}, "streams"),
        ({"threads": 0}, "threads"),
        ({"streams": 2.5}, "streams"),
        ({"precision": None}, "unknown precision None"),
        ({"precision": ["int8"]}, "unknown precision"),
        ({"ids": "yes"}, "ids should be of type bool"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        throughtime.stream(LSTM(3, 4), **options)


def test_more_streams_than_memory_and_more_threads_than_streams():
    for count in (1 << 55, 1 << 70):
        with pytest.raises(MemoryError, match=f"streams = {count:,}"):
            throughtime.stream(LSTM(3, 4), streams=count)
    many = throughtime.stream(LSTM(3, 4), streams=40, threads=1 << 70)
    assert many.step(np.zeros((40, 3), np.float32)).shape == (40, 4)


def test_inputs_that_numpy_does_not_have():
    one = throughtime.stream(made("gru", 3, 4))
    expected = one.clone().step(torch.tensor([-1.0, -1.0, -1.0]))
    negative = torch.complex(torch.ones(3), torch.ones(3)).conj().imag  # its signs aren't in its memory
    for same in (
        negative,
        torch.full((3,), -1.0).to(torch.float8_e4m3fn),
        torch.full((3,), -1.0, dtype=torch.bfloat16),
    ):
        assert torch.equal(one.clone().step(same), expected)
        assert torch.equal(one.clone().feed(same[None])[0], expected)


def test_inputs_are_checked():
    one, many = throughtime.stream(LSTM(3, 4)), throughtime.stream(LSTM(3, 4), streams=5)
    for call, error, said in [
        (lambda: one.step(np.zeros(4)), InputError, r"expected \(I\): I = 3"),
        (lambda: one.step(np.zeros((1, 3))), InputError, "shape"),
        (lambda: one.feed(np.zeros(3)), InputError, "shape"),
        (lambda: one.step(np.zeros(3, int)), InputError, "token ids"),
        (lambda: one.step(3), InputError, "floats"),
        (lambda: one.step(torch.zeros(3, requires_grad=True)), InputError, "detach"),
        (lambda: one.feed(np.zeros((0, 3)), last=True), InputError, "no steps"),
        (lambda: many.step(np.zeros((4, 3))), InputError, "N = 5"),
        (lambda: many.step(np.zeros((2, 3)), which=[1, 5]), IndexError, r"which\[1\] = 5"),
        (lambda: many.step(np.zeros((2, 3)), which=[1, 1]), ValueError, "twice"),
        (lambda: many.step(np.zeros((2, 3)), which=[0.5, 1]), InputError, "float64"),
        (lambda: many.reset(-1), IndexError, "from 0 to 4"),
        (lambda: many.reset(1 << 70), IndexError, f"which = {1 << 70}; expected a stream from 0 to 4"),
        (lambda: many.reset([0, 1 << 70]), IndexError, rf"which\[1\] = {1 << 70}; expected"),
        (
            lambda: many.reset(np.array([(1 << 64) - 1], np.uint64)),
            IndexError,
            rf"which\[0\] = {(1 << 64) - 1}; expected",
        ),
        (lambda: one.feed(np.zeros((2, 3)), last="x"), TypeError, "last should be of type bool"),
        (lambda: many.reset([True, False]), InputError, "mask"),
        (lambda: many.reset([[1], [2, 3]]), InputError, "which is a list that makes no array"),
        (lambda: many.reset(torch.zeros(2, device="meta")), InputError, "which is a Tensor that makes no array"),
        (lambda: one.feed([[1.0], [2.0, 3.0]]), InputError, "input is a list that makes no array"),
        (lambda: one.step(torch.zeros(3).to_sparse()), InputError, "dense tensor"),
        (lambda: one.step(torch.zeros(3, dtype=torch.complex64).conj()), InputError, "complex64"),
    ]:
        with pytest.raises(error, match=said):
            call()
    ids = throughtime.stream(nn.Sequential(nn.Embedding(9, 3), LSTM(3, 4)), streams=1)
    for bad in (-1, 9, 10**12):
        with pytest.raises(IndexError, match=f"token id {bad}"):
            ids.step(bad)
    for bad in (1 << 70, -(1 << 70), np.uint64(1 << 63)):
        for call in (lambda bad=bad: ids.step(bad), lambda bad=bad: ids.feed([bad])):
            with pytest.raises(IndexError, match="expected one from 0 to 8"):
                call()
    with pytest.raises(InputError, match="integers"):
        ids.step(0.5)


def test_threads_share_an_engine():
    """Each steps streams of its own, while states are read and clones made; the bits are as without any other."""
    layer = made("lstm", 8, 48)
    many = throughtime.stream(layer, streams=8)
    x = torch.randn(300, 8, 8)
    expected = run(layer, x)
    found, failed = torch.zeros_like(expected), []

    def work(number):
        try:
            for t in range(len(x)):
                found[t, number] = many.step(x[t, number], which=number)
                if t % 50 == 0:
                    twin = many.clone()
                    twin.restore(many.state(number), which=number)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert torch.equal(found, expected)


WRITING_TOGETHER = """
import sys, threading
import numpy as np, torch, throughtime
from throughtime.streaming.writing import Writer

model = torch.nn.Sequential(throughtime.GRU(30, 8), torch.nn.Linear(8, 30))
writer = Writer(throughtime.stream(model, ids=True), end=None)
writer.read([1, 2])
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=lambda: [writer.write(np.zeros(20)) for _ in range(1000)]) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("written")
"""


def test_threads_share_a_writer():
    """In a process of its own: two that write to the same memory end it."""
    done = subprocess.run([sys.executable, "-c", WRITING_TOGETHER], capture_output=True, text=True, check=False)
    assert done.stdout == "written\n", done.stderr


def test_the_gil_is_free_in_a_step():
    stream = throughtime.stream(made("lstm", 64, 512))
    x, out = np.zeros((4000, 64), np.float32), np.zeros((4000, 512), np.float32)
    ticks, done = [0], threading.Event()

    def tick():
        while not done.is_set():
            ticks[0] += 1
            done.wait(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    stream._engine.feed(len(x), 1, 0, x.ctypes.data, 0, out.ctypes.data, False)
    counted = ticks[0]
    done.set()
    thread.join()
    assert counted > 5


def test_every_instruction_set():
    x = torch.randn(20, 19)
    before = native.instruction_set()
    try:
        for name, cell in itertools.product(native.instruction_sets(), LAYERS):
            native.use_instruction_set(name)
            layer = made(cell, 19, 35)
            model = nn.Sequential(layer, nn.Linear(layer.output_size, 3))
            assert torch.equal(throughtime.stream(layer).feed(x), run(layer, x))
            exact = throughtime.stream(model).feed(x)
            for precision in ("bfloat16", "int8"):
                assert torch.allclose(throughtime.stream(model, precision=precision).feed(x), exact, atol=0.1)
    finally:
        native.use_instruction_set(before)


def test_a_stream_keeps_the_instructions_that_it_was_packed_for():
    layer, x = made("gru", 5, 33), torch.randn(9, 5)
    stream, before = throughtime.stream(layer), native.instruction_set()
    expected = stream.clone().feed(x)
    try:
        native.use_instruction_set("generic")
        assert torch.equal(stream.clone().feed(x), expected)
    finally:
        native.use_instruction_set(before)


def test_names_are_the_kernels_own():
    assert tuple(native.module.precisions()) == engine.PRECISIONS
    with pytest.raises(ValueError, match="there is no int4"):
        native.module.StreamWeights("int4")


@pytest.mark.parametrize("kind", ["linear", "recurrent", "embedding"])
def test_int8_refuses_sums_beyond_its_integers(kind):
    deep = 133_145
    model = {
        "linear": lambda: nn.Sequential(RNN(1, 1), nn.Linear(1, deep), nn.Linear(deep, 1)),
        "recurrent": lambda: RNN(deep, 1),
        "embedding": lambda: nn.Sequential(nn.Embedding(200, deep), RNN(deep, 1)),
    }[kind]()
    if kind == "embedding":  # whose products are made in float32, once
        assert throughtime.stream(model, precision="int8").precision == "int8"
        return
    with pytest.raises(InputError, match=r"at most 133144 numbers exactly, and a layer reads 133145"):
        throughtime.stream(model, precision="int8")


def test_int8_sums_as_many_as_its_integers_hold():
    deep = 133_144
    layer = RNN(deep, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_ih_l0.fill_(1 / deep)
    for sign in (1, -1):
        found = throughtime.stream(layer, precision="int8").step(np.full(deep, sign, np.float32))
        assert np.allclose(found, np.tanh(sign), atol=1e-3)


def test_a_table_takes_denormals_for_zero():
    """As the layer does, and the stream that multiplies at each step."""
    embedding, layer = nn.Embedding(3, 8), RNN(8, 4, nonlinearity="relu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        embedding.weight.fill_(0.6e-18)
        layer.weight_ih_l0.fill_(1e-20)  # each product is 6e-39, all eight together 4.8e-38
    found = throughtime.stream(nn.Sequential(embedding, layer)).step(1)
    assert np.array_equal(found, run(layer, embedding(torch.tensor([[1]])))[0, 0].numpy())


def test_ids_and_streams_are_copies():
    """Other threads may write to the caller's arrays after they have been checked."""
    stream = throughtime.stream(made("gru", 9, 4), ids=True, streams=2)
    ids, which = np.array([[1, 2]]), np.array([0, 1])
    assert not np.shares_memory(stream._array(ids), ids)
    tensor = torch.tensor([[1, 2]])
    assert not np.shares_memory(stream._array(tensor), tensor.numpy())
    chosen = engine._Chosen.of(which, 2).array
    assert chosen is not None
    assert not np.shares_memory(chosen, which)


def test_a_long_feed_is_one_call_to_others():
    """Another thread's step comes before or after all of it."""
    layer = made("lstm", 8, 512)
    stream, x = throughtime.stream(layer), torch.randn(4500, 8)  # three parts, between which others could come
    zero, begun = torch.zeros(8), threading.Event()

    def step():
        begun.wait()
        for _ in range(20):
            stream.step(zero)

    thread = threading.Thread(target=step)
    thread.start()
    begun.set()
    found = stream.feed(x)
    thread.join()
    before = next(n for n in range(21) if torch.equal(after(layer, n, zero, x[:1])[0], found[0]))
    assert torch.equal(found, after(layer, before, zero, x))


def after(layer, steps, zero, x):
    stream = throughtime.stream(layer)
    for _ in range(steps):
        stream.step(zero)
    return stream.feed(x)
