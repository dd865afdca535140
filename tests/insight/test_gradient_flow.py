"""The lag matrix and everything made of it, against autograd and closed forms, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from insight.reference import state_gradients, unroll, weight_gradients
from torch import nn

import throughtime
from throughtime import insight
from throughtime.cells import CELLS
from throughtime.errors import InputError
from throughtime.insight import adjoint

LAYERS = {
    "rnn_tanh": throughtime.RNN,
    "rnn_relu": lambda *sizes, **more: throughtime.RNN(*sizes, nonlinearity="relu", **more),
    "lstm": throughtime.LSTM,
    "gru": throughtime.GRU,
    "gru_reset_before": lambda *sizes, **more: throughtime.GRU(*sizes, reset_after=False, **more),
    "mgu": throughtime.MGU,
    "lstm+coupled+peepholes+layer_norm": lambda *sizes, **more: throughtime.LSTM(
        *sizes, coupled=True, peepholes=True, layer_norm=True, **more
    ),
}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make(cell, inputs=3, hidden=5, **more):
    layer = LAYERS[cell](inputs, hidden, **more).double()
    for parameter in layer.parameters():  # larger than torch's start, so that far lags are not all zero
        nn.init.uniform_(parameter, -0.7, 0.7)
    return layer


def assert_matches_autograd(cell, layer, x, lengths=None, reset=None, lags=None, probes=None):
    recording = insight.record(layer, x, lengths=lengths, reset=reset)
    unrolled = unroll(cell, layer, x, lengths, reset)
    torch.testing.assert_close(recording.outputs, unrolled.outputs.detach(), **CLOSE)
    grad_outputs = torch.randn_like(recording.outputs)
    steps, batch = x.shape[:2]
    lags = lags or steps
    matrices = insight.lag_matrix(recording, grad_outputs, lags=lags, probes=probes)
    ends = torch.full((batch,), steps) if lengths is None else lengths
    masked = torch.where((torch.arange(steps)[:, None] < ends)[:, :, None], grad_outputs, 0)
    for row, s in enumerate(matrices[0].losses.tolist()):
        exact = state_gradients(unrolled, masked, s)
        for matrix, lane in zip(matrices, exact, strict=True):
            norms = torch.stack([torch.cat(state, 1).norm(dim=1) for state in lane])  # (T, B)
            reached = {s + k if matrix.reverse else s - k for k in matrix.lags.tolist()}
            norms[[t for t in range(steps) if t not in reached]] = 0
            by_row = torch.zeros_like(norms)
            for k, lag in enumerate(matrix.lags.tolist()):
                t = s + lag if matrix.reverse else s - lag
                if 0 <= t < steps:
                    by_row[t] = matrix.norms[row, k]
            torch.testing.assert_close(by_row, norms, **CLOSE)
            rows_with_loss = max(1, int((ends > s).sum()))
            torch.testing.assert_close(matrix.matrix[row], norms.sum(1) / rows_with_loss, **CLOSE)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_lag_matrix_is_autograds(cell, depth, bidirectional, ragged):
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    lengths = torch.tensor([7, 4, 0, 1]) if ragged else None
    reset = torch.rand(7, 4) < 0.3 if ragged else None
    assert_matches_autograd(cell, make(cell, num_layers=depth, bidirectional=bidirectional), x, lengths, reset)


@given(
    cell=st.sampled_from(list(LAYERS)),
    depth=st.integers(1, 2),
    bidirectional=st.booleans(),
    steps=st.integers(1, 8),
    lags=st.integers(1, 9),
    probes=st.sampled_from([None, 1, 3]),
    ragged=st.booleans(),
    resets=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_window_and_probes_are_parts_of_the_whole(
    *, cell, depth, bidirectional, steps, lags, probes, ragged, resets, seed
):
    torch.manual_seed(seed)
    layer = make(cell, hidden=3, num_layers=depth, bidirectional=bidirectional)
    x = torch.randn(steps, 3, 3, dtype=torch.float64)
    lengths = torch.randint(0, steps + 1, (3,)) if ragged else None
    reset = torch.rand(steps, 3) < 0.3 if resets else None
    assert_matches_autograd(cell, layer, x, lengths, reset, min(lags, steps), probes)


@pytest.mark.parametrize("proj_size", [0, 2])
def test_cells_without_factors_are_carried_by_their_own_equations(monkeypatch, proj_size):
    if not proj_size:
        monkeypatch.setitem(CELLS, "lstm", CELLS["lstm"]._replace(linearise=None))
    layer = throughtime.LSTM(3, 5, 2, proj_size=proj_size).double()
    assert_matches_autograd("lstm", layer, torch.randn(6, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_blocks_of_losses_add_up(monkeypatch, bidirectional):
    monkeypatch.setattr(adjoint, "BLOCK_ELEMENTS", 200)
    layer = make("gru", num_layers=2, bidirectional=bidirectional)
    assert_matches_autograd("gru", layer, torch.randn(9, 2, 3, dtype=torch.float64), lags=9 if bidirectional else 4)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_torchs_layers_are_read_and_left_as_they_are(kind):
    layer = getattr(nn, kind)(3, 5, 2, batch_first=True, dropout=0.5).double()
    ours = getattr(throughtime, kind)(3, 5, 2, batch_first=True, dropout=0.5).double()
    ours.load_state_dict(layer.state_dict())
    before = {name: w.clone() for name, w in layer.state_dict().items()}
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    grad_outputs = torch.randn(9, 2, 5, dtype=torch.float64)
    theirs = insight.lag_matrix(insight.record(layer, x), grad_outputs)
    for a, b in zip(theirs, insight.lag_matrix(insight.record(ours, x), grad_outputs), strict=True):
        torch.testing.assert_close(a.norms, b.norms)
    assert layer.training
    assert all(torch.equal(w, before[name]) for name, w in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())


def test_a_linear_network_has_its_closed_form():
    """h_t = W h_{t−1} + x_t with everything positive, so that relu does nothing: ∂L_s/∂h_t = (Wᵀ)^{s−t} g."""
    layer = throughtime.RNN(4, 4, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(4))
        layer.weight_hh_l0.uniform_(0.05, 0.3)
    weight = layer.weight_hh_l0.detach()
    x, grad = torch.rand(12, 3, 4, dtype=torch.float64) + 0.1, torch.randn(12, 3, 4, dtype=torch.float64)
    (lag,) = insight.lag_matrix(insight.record(layer, x), grad)
    for s in range(12):
        for k in range(s + 1):
            expected = (grad[s] @ torch.linalg.matrix_power(weight, k)).norm(dim=1)
            torch.testing.assert_close(lag.norms[s, k], expected, **CLOSE)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize(("depth", "bidirectional"), [(1, False), (2, False), (1, True)])
def test_itemised_gradients_are_each_losses_own_and_sum_to_grad(cell, depth, bidirectional):
    layer = make(cell, num_layers=depth, bidirectional=bidirectional)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    lengths, reset = torch.tensor([6, 2, 4]), torch.rand(6, 3) < 0.3
    recording = insight.record(layer, x, lengths=lengths, reset=reset)
    grad_outputs = torch.randn_like(recording.outputs)
    items = insight.itemised_gradients(recording, grad_outputs)
    by_lag = insight.lag_gradients(recording, grad_outputs)
    unrolled = unroll(cell, layer, x, lengths, reset)
    for s in range(6):
        for lane, exact in zip(items, weight_gradients(unrolled, grad_outputs, [s]), strict=True):
            for part, e in zip(lane.to_list(), exact, strict=True):
                torch.testing.assert_close(part[s].sum(0), e, **CLOSE)
    (layer(x, lengths=lengths, reset=reset)[0] * grad_outputs).sum().backward()
    for row, lane, lags in zip(layer.all_weights, items, by_lag, strict=True):
        for parameter, part, g in zip(row, lane.to_list(), lags.to_list(), strict=True):
            torch.testing.assert_close(part.sum((0, 1)), parameter.grad, **CLOSE)
            torch.testing.assert_close(g, part.sum(0), **CLOSE)


def test_the_variance_of_a_weights_gradient_is_the_known_one():
    """h_t = λ h_{t−1} + x_t with white x: Var(dh/dλ) = (1 + λ²)/(1 − λ²)³, the sum of the squared answers to one impulse."""
    lam, steps = 0.8, 300
    layer = throughtime.RNN(1, 1, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0)
        layer.weight_hh_l0.fill_(lam)
    impulse = torch.zeros(steps, 1, 1, dtype=torch.float64)
    impulse[0] = 1
    (items,) = insight.itemised_gradients(insight.record(layer, impulse), torch.ones_like(impulse))
    variance = items.weight_hh.sum(1).square().sum()  # dh_s/dλ = Σ_k of the items of h_s
    assert variance.item() == pytest.approx((1 + lam**2) / (1 - lam**2) ** 3, rel=1e-10)


@pytest.mark.parametrize(("depth", "bidirectional"), [(1, False), (3, False), (2, True)])
def test_the_total_adjoint_is_the_sum_over_the_losses(depth, bidirectional):
    layer = make("lstm", num_layers=depth, bidirectional=bidirectional)
    x, lengths, reset = torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([6, 0, 4]), torch.rand(6, 3) < 0.3
    recording = insight.record(layer, x, lengths=lengths, reset=reset)
    grad_outputs = torch.randn_like(recording.outputs)
    totals = insight.total_adjoint(recording, grad_outputs)
    unrolled = unroll("lstm", layer, x, lengths, reset)
    each = [state_gradients(unrolled, grad_outputs, s) for s in range(6)]
    for i, total in enumerate(totals):
        for part, found in enumerate(total):
            exact = sum(torch.stack([state[part] for state in lanes[i]]) for lanes in each)
            torch.testing.assert_close(found, exact, **CLOSE)


def test_cancellation():
    layer = make("gru")
    recording = insight.record(layer, torch.randn(8, 3, 3, dtype=torch.float64))
    grad_outputs = torch.randn_like(recording.outputs)
    (kappa,) = insight.cancellation(recording, grad_outputs)
    (lag,) = insight.lag_matrix(recording, grad_outputs)
    (total,) = insight.total_adjoint(recording, grad_outputs)
    apart = lag.matrix.sum(0) * 3  # Σ_s and the batch
    torch.testing.assert_close(kappa, total[0].norm(dim=2).sum(1) / apart, **CLOSE)
    one_loss = torch.zeros_like(grad_outputs)
    one_loss[5] = grad_outputs[5]
    (kappa,) = insight.cancellation(recording, one_loss)
    torch.testing.assert_close(kappa[:6], torch.ones(6, dtype=torch.float64), **CLOSE)
    assert kappa[6:].isnan().all()


@pytest.mark.parametrize(("depth", "bidirectional"), [(1, False), (2, False), (2, True)])
def test_connectivity_is_autograds(depth, bidirectional):
    layer = make("lstm", num_layers=depth, bidirectional=bidirectional)
    x = torch.randn(7, 3, 3, dtype=torch.float64, requires_grad=True)
    recording = insight.record(layer, x)
    grad_output = torch.randn_like(recording.outputs[0])
    (exact,) = torch.autograd.grad((layer(x)[0][4] * grad_output).sum(), x)
    torch.testing.assert_close(insight.connectivity(recording, grad_output, 4), exact.norm(dim=2), **CLOSE)


def test_padding_is_not_read():
    layer = make("lstm")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    lengths = torch.tensor([5, 2])
    x[2:, 1] = torch.nan
    grad_outputs = torch.full((5, 2, 5), torch.nan, dtype=torch.float64)
    grad_outputs[:, 0], grad_outputs[:2, 1] = 1, 1
    (lag,) = insight.lag_matrix(insight.record(layer, x, lengths=lengths), grad_outputs)
    assert lag.norms.isfinite().all()
    assert lag.matrix.isfinite().all()


def lag_matrix_of(curves):
    """A lag matrix of one loss whose rows have the given curves."""
    norms = torch.tensor(curves, dtype=torch.float64).T[None]
    steps = norms.shape[1]
    return insight.LagMatrix(
        "layer 0", torch.tensor([steps - 1]), torch.arange(steps), norms, torch.ones_like(norms) > 0, False, steps
    )


def test_the_horizon_and_its_interval():
    slow, fast = [0.9**k for k in range(100)], [0.5**k for k in range(100)]
    reach = insight.horizon(lag_matrix_of([slow] * 8), 0.1)
    assert reach == (0.1, 22.0, 22.0, 22.0)  # 0.9²¹ = 0.109, 0.9²² = 0.098
    mixed = insight.horizon(lag_matrix_of([slow] * 4 + [fast] * 4), 0.1)
    assert 4 <= mixed.low < mixed.lag < mixed.high
    assert insight.horizon(lag_matrix_of([[1.0] * 10] * 2), 0.1) == (0.1, math.inf, math.inf, math.inf)
    wide, narrow = (insight.horizon(lag_matrix_of([slow] * 4 + [fast] * 4), 0.1, confidence=c) for c in (0.99, 0.5))
    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_one_row_has_no_interval():
    (epsilon, lag, low, high) = insight.horizon(lag_matrix_of([[0.9**k for k in range(100)]]), 0.1)
    assert (epsilon, lag) == (0.1, 22.0)
    assert math.isnan(low)
    assert math.isnan(high)


def test_rows_that_are_gone_altogether_have_an_interval():
    dead = insight.horizon(lag_matrix_of([[1.0, 0.0, 0.0]] * 4), 1e-3)
    assert dead == (1e-3, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("rows", "spread"), [(3, 0.3), (4, 0.1), (4, 0.3), (8, 0.3), (12, 0.3), (16, 0.3)])
def test_intervals_cover_what_they_say_where_rows_decay_at_different_rates(rows, spread):
    """Rows e^{−rate k} whose rates are log-normal: few of them hold the mean up far out, and a sample may lack those."""
    draws, lags = 400, torch.arange(400, dtype=torch.float64)
    generator = torch.Generator().manual_seed(rows)

    def curves(*shape):
        rates = 0.05 * torch.exp(spread * torch.randn(shape, generator=generator, dtype=torch.float64))
        return torch.exp(-rates[..., None] * lags)

    mean = torch.stack([curves(5000).mean(0) for _ in range(20)]).mean(0)
    exact = int((mean < 1e-3).nonzero()[0])
    covered = 0
    for sample in curves(draws, rows):
        reach = insight.horizon(lag_matrix_of(sample.tolist()), 1e-3)
        covered += reach.low <= exact <= reach.high
    assert covered >= 0.93 * draws  # of 95 % intervals


@pytest.mark.parametrize("layers", [1, 2])
def test_norms_are_told_down_to_what_float32_holds(layers):
    """Not down to the root of it: the square of 1e-20 is no float32, and a curve would end in a fall that isn't there."""
    torch.manual_seed(1)
    layer = throughtime.init.orthogonal_(throughtime.RNN(3, 8, layers), gain=0.6)
    x, gradients = torch.randn(170, 2, 3), torch.randn(170, 2, 8)
    exact, single = (
        (
            insight.lag_matrix(insight.record(layer, x, dtype=dtype), gradients, probes=4)[0].curve.double(),
            insight.input_reach(insight.record(layer, x, dtype=dtype), gradients)[-1, :, 0].double(),
        )
        for dtype in (torch.float64, torch.float32)
    )
    for wanted, found in zip(exact, single, strict=True):
        deep = (wanted > 1e-34) & (wanted < 1e-22)
        assert deep.sum() > 10
        torch.testing.assert_close(found[deep], wanted[deep], rtol=1e-2, atol=0)


def test_tail_decay():
    curve = torch.tensor([0.9**k for k in range(200)], dtype=torch.float64)
    assert insight.tail_decay(curve) == pytest.approx(0.9)
    assert math.isnan(insight.tail_decay(torch.ones(1)))
    assert insight.tail_decay(2.0 ** torch.arange(200.0)) == pytest.approx(2)  # past 2¹²⁷ a float32 is infinite


def test_the_bias_of_chunks_is_that_of_every_place_in_them():
    """What chunks of K steps lose of the mass, counted loss by loss: the one at place j keeps the lags 0 … j."""
    curve = torch.tensor([0.97**k for k in range(400)], dtype=torch.float64)
    for length in (1, 7, 64, 300):
        kept = sum(curve[: place + 1].sum() for place in range(length)) / length
        assert insight.truncation_bias(curve, length) == pytest.approx(1 - kept.item() * 0.03, abs=1e-4)
    assert insight.truncation_bias(curve[:150], 64) == pytest.approx(insight.truncation_bias(curve, 64), rel=1e-3)
    assert math.isnan(insight.truncation_bias(torch.ones(20), 64))


def test_the_length_for_a_bias_is_the_least():
    curve = torch.tensor([0.97**k for k in range(200)], dtype=torch.float64)
    length = insight.truncation_length(curve, 0.1)
    assert insight.truncation_bias(curve, int(length)) <= 0.1 < insight.truncation_bias(curve, int(length) - 1)
    assert insight.truncation_length(torch.ones(20), 0.1) == math.inf
    assert insight.truncation_length(curve[:40], 0.1) == math.inf  # a third of the mass lies beyond the window


def test_nothing_is_needed_where_nothing_is_left():
    dead = torch.tensor([1.0] + [0.0] * 99)
    assert insight.truncation_length(dead, 0.1) == 1
    assert insight.truncation_bias(dead, 64) == 0


def test_the_bias_is_that_of_training_in_chunks():
    """A linear network on white noise with losses of one kind, whose gradients of different lags don't cancel."""
    layer = throughtime.RNN(1, 1, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0)
        layer.weight_hh_l0.fill_(0.9)
    x = torch.ones(50 * 64, 1, 1, dtype=torch.float64)

    def gradient(length):
        layer.zero_grad()
        state = None
        for chunk in x.split(length):
            output, state = layer(chunk, state)
            output.sum().backward()
            state = state.detach()
        return layer.weight_ih_l0.grad.item()

    recording = insight.record(layer, x)
    (lag,) = insight.lag_matrix(recording, torch.ones_like(recording.outputs), lags=200, probes=8)
    for length in (16, 64):  # the first chunk alone loses nothing, since nothing comes before it
        measured = 1 - gradient(length) / gradient(len(x))
        assert insight.truncation_bias(lag.curve, length) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda r, g: insight.lag_matrix(r, g, lags=0), "lags = 0: expected at least 1"),
        (lambda r, g: insight.lag_matrix(r, g, probes=0), "probes = 0: expected at least one"),
        (lambda r, g: insight.lag_matrix(r, g[1:]), "grad_outputs has shape"),
        (lambda r, g: insight.connectivity(r, g[0], 9), "step = 9: expected one of the recorded steps, 0 to 4"),
        (lambda r, g: insight.truncation_length(torch.ones(3), 2.0), "bias = 2.0"),
        (lambda r, g: insight.truncation_bias(torch.ones(3), 0), "length = 0: expected at least one step"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    recording = insight.record(make("gru"), torch.randn(5, 2, 3, dtype=torch.float64))
    with pytest.raises(InputError, match=said):
        call(recording, torch.ones_like(recording.outputs))


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_loss_hangs_on_is_autograds(cell, depth):
    layer, x = make(cell, num_layers=depth), torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[3, 1] = True
    grad_outputs = torch.randn(7, 2, 5, dtype=torch.float64)
    reach = insight.input_reach(insight.record(layer, x, reset=reset), grad_outputs, lags=5)
    outputs = layer(x, reset=reset)[0]
    for s in range(7):
        (grad,) = torch.autograd.grad(outputs[s], x, grad_outputs[s], retain_graph=True)
        wanted = [grad[s - k].norm(dim=1) if k <= s else torch.zeros(2, dtype=torch.float64) for k in range(5)]
        torch.testing.assert_close(reach[s], torch.stack(wanted), **CLOSE)


def test_what_a_loss_hangs_on_has_one_direction():
    with pytest.raises(InputError, match="runs both ways"):
        insight.input_reach(insight.record(make("gru", bidirectional=True), torch.randn(5, 2, 3)), torch.ones(5, 2, 10))


def test_zoneout_is_refused():
    with pytest.raises(InputError, match=r"zoneout=0.1 can't be recorded.*; measure one trained without"):
        insight.record(throughtime.GRU(3, 4, zoneout=0.1), torch.zeros(5, 2, 3))


def test_what_would_not_fit_in_memory_is_refused():
    recording = insight.record(throughtime.LSTM(3, 64), torch.randn(300, 1, 3))
    with pytest.raises(InputError, match="lag_gradients"):
        insight.itemised_gradients(recording, torch.ones_like(recording.outputs))
    deep = insight.record(make("rnn_tanh", num_layers=2, bidirectional=True), torch.randn(4, 1, 3))
    with pytest.raises(InputError, match="bidirectional"):
        insight.lag_gradients(deep, torch.ones_like(deep.outputs))
