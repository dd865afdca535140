"""The layers' variants: against a second formulation, seeded and reproducible, with lengths, resets, stacks; and their errors."""

import copy

import pytest
import torch
import variants
from comparison import BACKENDS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import throughtime
from throughtime.stack import draw_mask

SERVING = [name for name in BACKENDS if name != "torch"]
LAYERS = {
    "rnn": lambda *sizes, **k: throughtime.RNN(*sizes, layer_norm=True, **k),
    "lstm": lambda *sizes, **k: throughtime.LSTM(*sizes, layer_norm=True, peepholes=True, **k),
    "lstm_coupled": lambda *sizes, **k: throughtime.LSTM(*sizes, coupled=True, peepholes=True, **k),
    "lstm_projected": lambda *sizes, **k: throughtime.LSTM(*sizes, layer_norm=True, proj_size=3, **k),
    "gru": lambda *sizes, **k: throughtime.GRU(*sizes, layer_norm=True, **k),
    "gru_reset_before": lambda *sizes, **k: throughtime.GRU(*sizes, layer_norm=True, reset_after=False, **k),
    "mgu": lambda *sizes, **k: throughtime.MGU(*sizes, layer_norm=True, **k),
}
DROPPING = {"zoneout": 0.3, "recurrent_dropout": 0.4, "weight_drop": 0.2}


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def rows_of(state, row):
    return tuple(s[:, row : row + 1] for s in state) if isinstance(state, tuple) else state[:, row : row + 1]


def random_hx(layer: nn.Module, batch: int):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, batch, layer.output_size, dtype=torch.float64)
    return (h, torch.randn(rows, batch, layer.hidden_size, dtype=torch.float64)) if "lstm" in layer.cell else h


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", SERVING)
def test_evaluation_is_the_expectation(name, backend):
    layer = LAYERS[name](3, 5, backend=backend, **DROPPING).double().eval()
    x, hx = torch.randn(6, 4, 3, dtype=torch.float64), random_hx(layer, 4)
    output, final = layer(x, hx)
    state = [s[0] for s in as_tuple(hx)]
    cell = "+".join([layer.cell, *["zoneout_h", "zoneout_c"][: len(state)]])
    masks = [torch.tensor(0.3, dtype=torch.float64)] * len(state)
    expected = variants.run(cell, x, state, layer.all_weights[0], masks)
    for a, e in zip((output, *(s[0] for s in as_tuple(final))), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def parity(results) -> None:
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_seed_governs_what_is_dropped(name):
    """Whatever computes, and with however many threads; outputs and gradients."""
    layer = LAYERS[name](3, 8, num_layers=2, bidirectional=True, dropout=0.1, **DROPPING).double()
    x = torch.randn(5, 9, 3, dtype=torch.float64)

    def train(backend: str, threads: int, seed: int):
        twin = copy.deepcopy(layer)
        twin.backend = backend
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        output, _ = twin(x)
        output.square().sum().backward()
        torch.set_num_threads(1)
        return [output.detach(), *(p.grad for p in twin.parameters())]

    cases = [(backend, threads) for backend in SERVING for threads in (1, 2)]
    results = [train(backend, threads, seed=4) for backend, threads in cases]
    parity(results)
    for (backend, _), result in zip(cases, results, strict=True):
        if backend == "native":
            assert torch.equal(result[0], results[cases.index(("native", 1))][0])
    assert not torch.allclose(train("auto", 1, seed=5)[0], results[0][0])


def test_a_stored_random_state_goes_on_with_the_same_masks():
    layer = throughtime.LSTM(3, 4, zoneout=(0.5, 0.2), recurrent_dropout=0.2)
    x = torch.randn(7, 2, 3)
    layer(x)
    state = torch.get_rng_state()
    expected, _ = layer(x)
    torch.set_rng_state(state)
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.9, 0.999999])
def test_masks_are_drawn_with_their_probability(probability):
    mask = draw_mask(probability, (101, 33, 61), torch.device("cpu"))
    assert mask.shape == (101, 33, 61)
    assert abs(mask.double().mean().item() - probability) < 0.004
    if 0.1 < probability < 0.99:  # neighbours share a random number, and are independent all the same
        flat = mask.flatten().double() - probability
        for lag in (1, 2, 3, 4):
            assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 0.004


def test_recurrent_dropout_is_one_mask_for_the_whole_sequence():
    layer = throughtime.RNN(2, 50, nonlinearity="relu", bias=False, recurrent_dropout=0.5)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.eye(50))
    output, h = layer(torch.zeros(4, 30, 2), torch.ones(1, 30, 50))
    alive = output > 0
    assert torch.equal(alive[0], alive[3])
    assert 0.4 < alive[0].double().mean().item() < 0.6
    assert torch.equal(h[0][alive[0]].unique(), torch.tensor([16.0]))
    torch.testing.assert_close(layer.eval()(torch.zeros(4, 30, 2), torch.ones(1, 30, 50))[0], torch.ones(4, 30, 50))


def test_weight_drop_drops_weights():
    layer = throughtime.GRU(3, 60, num_layers=2, bidirectional=True, weight_drop=0.3)
    x = torch.randn(4, 2, 3)
    dropped = layer._weights()
    for row, whole in zip(dropped, layer.all_weights, strict=True):
        is_zero = row.weight_hh == 0
        assert 0.25 < is_zero.double().mean().item() < 0.35
        torch.testing.assert_close(row.weight_hh[~is_zero], whole[1][~is_zero] / 0.7)
        assert all(a is b for a, b in zip(row.to_list()[2:], whole[2:], strict=True))
    assert not torch.allclose(layer(x)[0], layer(x)[0])
    layer.eval()
    plain = throughtime.GRU(3, 60, num_layers=2, bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])
    layer.train()
    layer.backend = "torch"  # which sees weights, not where they come from
    torch.manual_seed(1)
    expected, _ = layer(x)
    layer.backend = "reference"
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", SERVING)
def test_lengths_are_each_row_alone(name, backend):
    layer = LAYERS[name](3, 4, num_layers=2, bidirectional=True, backend=backend, zoneout=0.2).double().eval()
    lengths = torch.tensor([4, 0, 9, 1])
    x, hx = torch.randn(9, 4, 3, dtype=torch.float64), random_hx(layer, 4)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    output, final = layer(x, hx, lengths=lengths)
    weights = torch.randn(output.shape, dtype=torch.float64)
    together = torch.autograd.grad((output * weights).sum(), list(layer.parameters()))
    apart = [torch.zeros_like(p) for p in layer.parameters()]
    for row, length in enumerate(map(int, lengths)):
        last = mine = rows_of(hx, row)
        if length:
            alone, last = layer(x[:length, row : row + 1], mine)
            torch.testing.assert_close(output[:length, row], alone[:, 0], rtol=1e-10, atol=1e-11)
            grads = torch.autograd.grad((alone[:, 0] * weights[:length, row]).sum(), list(layer.parameters()))
            apart = [a + g for a, g in zip(apart, grads, strict=True)]
        assert not output[length:, row].any()
        for whole, single in zip(as_tuple(final), as_tuple(last), strict=True):
            torch.testing.assert_close(whole[:, row], single[:, 0], rtol=1e-10, atol=1e-11)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", SERVING)
def test_resets_are_sequences_apart(name, backend):
    layer = LAYERS[name](3, 4, num_layers=2, backend=backend, zoneout=0.2).double().eval()
    x, reset = torch.randn(12, 3, 3, dtype=torch.float64), torch.rand(12, 3) < 0.3
    hx = random_hx(layer, 3)
    output, _ = layer(x, hx, reset=reset, reset_to=hx)
    for row in range(3):
        begins = sorted({0, *reset[:, row].nonzero().flatten().tolist()})
        for begin, end in zip(begins, [*begins[1:], 12], strict=True):
            alone, _ = layer(x[begin:end, row : row + 1], rows_of(hx, row))
            torch.testing.assert_close(output[begin:end, row], alone[:, 0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", SERVING)
def test_token_ids_are_one_hot_vectors(name, backend):
    layer = LAYERS[name](7, 5, num_layers=2, bidirectional=True, backend=backend, **DROPPING).double()
    ids, lengths = torch.randint(0, 7, (6, 4)), torch.tensor([6, 0, 3, 1])
    results = []
    for x in (ids, nn.functional.one_hot(ids, 7).double()):
        torch.manual_seed(3)
        layer.zero_grad()
        output, final = layer(x, lengths=lengths)
        (output.sin().sum() + sum(s.cos().sum() for s in as_tuple(final))).backward()
        results.append([output.detach(), *(p.grad.clone() for p in layer.parameters())])
    parity(results)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_come_back_packed(name):
    layer = LAYERS[name](3, 4, num_layers=2, bidirectional=True, **DROPPING)
    x, lengths = torch.randn(6, 3, 3), torch.tensor([3, 6, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.manual_seed(1)
    actual, _ = layer(packed)
    assert actual.data.shape == (10, 2 * layer.output_size)
    layer.eval()
    expected, _ = layer(x, lengths=lengths)
    expected = pack_padded_sequence(expected, lengths, enforce_sorted=False)
    torch.testing.assert_close(layer(packed)[0].data, expected.data)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", SERVING)
def test_packed_sequences_meet_the_masks_that_lengths_meet(name, backend):
    layer = LAYERS[name](3, 4, num_layers=2, bidirectional=True, backend=backend, **DROPPING)
    x, lengths = torch.randn(6, 4, 3), torch.tensor([3, 6, 1, 6])
    results = []
    for is_packed in (True, False):
        torch.manual_seed(1)
        layer.zero_grad()
        if is_packed:
            output, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
            output = pad_packed_sequence(output)[0]
        else:
            output, final = layer(x, lengths=lengths)
        (output.square().sum() + sum(s.cos().sum() for s in as_tuple(final))).backward()
        results.append([output.detach(), *as_tuple(final), *(p.grad for p in layer.parameters())])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_parameters_and_their_beginnings():
    layer = throughtime.LSTM(3, 4, 2, layer_norm=True, peepholes=True, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if name.endswith("l1_reverse")}
    assert shapes == {
        "weight_ih_l1_reverse": (16, 8),
        "weight_hh_l1_reverse": (16, 4),
        "bias_ih_l1_reverse": (16,),
        "bias_hh_l1_reverse": (16,),
        "weight_ch_l1_reverse": (12,),
        "gain_ih_l1_reverse": (16,),
        "gain_hh_l1_reverse": (16,),
        "gain_c_l1_reverse": (4,),
        "shift_c_l1_reverse": (4,),
    }
    assert (layer.gain_hh_l0 == 1).all()
    assert (layer.shift_c_l1 == 0).all()
    assert 0 < layer.weight_ch_l0.abs().max() <= 0.5
    coupled = throughtime.LSTM(3, 4, coupled=True, peepholes=True)
    assert coupled.weight_ih_l0.shape == (12, 3)
    assert coupled.weight_ch_l0.shape == (8,)
    assert "gain_c_l0" not in dict(throughtime.GRU(3, 4, layer_norm=True).named_parameters())


def test_initialisations_know_the_coupled_gates():
    layer = throughtime.init.forget_bias_(throughtime.LSTM(3, 4, coupled=True), 2.0)
    assert ((layer.bias_ih_l0 + layer.bias_hh_l0)[:4] == 2).all()
    rest = (layer.bias_ih_l0 + layer.bias_hh_l0)[4:].clone()
    throughtime.init.chrono_(layer, 50)
    bias = layer.bias_ih_l0 + layer.bias_hh_l0
    assert (bias[:4] > 0).all()
    assert torch.equal(bias[4:], rest)


def test_repr_names_the_variants():
    layer = throughtime.LSTM(3, 4, layer_norm=True, coupled=True, zoneout=(0.5, 0.1))
    assert repr(layer) == "LSTM(3, 4, layer_norm=True, coupled=True, zoneout=(0.5, 0.1))"
    assert repr(throughtime.GRU(3, 4, weight_drop=0.5, recurrent_dropout=0.25)) == (
        "GRU(3, 4, recurrent_dropout=0.25, weight_drop=0.5)"
    )
    relu = throughtime.RNN(3, 4, nonlinearity="relu", layer_norm=True, zoneout=0.1)
    assert repr(relu) == "RNN(3, 4, layer_norm=True, zoneout=0.1, nonlinearity=relu)"
    assert not throughtime.GRU(3, 4, layer_norm=True, reset_after=False).reset_after


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: throughtime.LSTM(3, 4, zoneout=1.0), ValueError, "from 0 to below 1, or a pair of them for c and h"),
        (lambda: throughtime.LSTM(3, 4, zoneout=(0.1, -0.1)), ValueError, r"got \(0.1, -0.1\)"),
        (lambda: throughtime.GRU(3, 4, zoneout=(0.1, 0.1)), ValueError, r"from 0 to below 1, got \(0.1, 0.1\)"),
        (
            lambda: throughtime.RNN(3, 4, recurrent_dropout=True),
            ValueError,
            "recurrent_dropout should be a probability",
        ),
        (lambda: throughtime.RNN(3, 4, weight_drop=1), ValueError, "weight_drop should be a probability"),
        (lambda: throughtime.LSTM(3, 4, layer_norm=1), TypeError, "layer_norm should be of type bool"),
        (lambda: throughtime.LSTM(3, 4, peepholes="yes"), TypeError, "peepholes should be of type bool"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layer_norm": True}, "it has no layer norm"),
        ({"coupled": True, "peepholes": True}, "it has no coupled, peepholes"),
        ({"zoneout": (0.0, 0.1)}, "it has no zoneout h"),
        ({"recurrent_dropout": 0.1}, "it has no recurrent dropout"),
    ],
)
def test_torchs_own_call_refuses_variants_with_a_reason(options, reason):
    layer = throughtime.LSTM(3, 4, backend="torch", **options)
    with pytest.raises(NotImplementedError, match=f"can't serve this request: {reason}"):
        layer(torch.zeros(2, 1, 3))
