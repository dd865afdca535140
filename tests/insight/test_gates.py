import pytest
import torch
from insight.reference import state_gradients, unroll
from insight.test_gradient_flow import CLOSE, make

import throughtime
from throughtime import insight
from throughtime.errors import InputError


def constant_lstm(forget, steps=12, **more):
    """An LSTM whose forget gates stand at fixed values, one for each unit."""
    layer = throughtime.LSTM(2, len(forget)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[len(forget) : 2 * len(forget)] = torch.logit(torch.tensor(forget, dtype=torch.float64))
    return insight.record(layer, torch.randn(steps, 3, 2, dtype=torch.float64), **more)


def test_how_open_gates_stand():
    use = {gate.name: gate for gate in insight.gate_use(constant_lstm([0.95, 0.05, 0.5, 0.99]).lanes[0])}
    assert use["forget"].open == 0.5
    assert use["forget"].closed == 0.25
    assert use["forget"].mean == pytest.approx(0.6225)
    assert use["input"] == ("input", 0.5, 0.0, 0.0)
    assert [
        gate.name for gate in insight.gate_use(insight.record(throughtime.GRU(2, 3), torch.ones(4, 1, 2)).lanes[0])
    ] == [
        "reset",
        "update",
    ]
    assert insight.gate_use(insight.record(throughtime.RNN(2, 3), torch.ones(4, 1, 2)).lanes[0]) == []


def test_padding_does_not_count():
    layer = make("lstm")
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    short = insight.record(layer, x[:4])
    padded = insight.record(layer, x, lengths=torch.tensor([4, 4]))
    assert insight.gate_use(short.lanes[0]) == insight.gate_use(padded.lanes[0])
    torch.testing.assert_close(insight.time_constants(short.lanes[0]), insight.time_constants(padded.lanes[0]))
    torch.testing.assert_close(insight.carousel(short.lanes[0]), insight.carousel(padded.lanes[0])[:4])


def test_time_constants_and_the_carousel_of_constant_gates():
    lane = constant_lstm([0.9, 0.5]).lanes[0]
    torch.testing.assert_close(insight.time_constants(lane), torch.tensor([10.0, 2.0], dtype=torch.float64))
    k = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(insight.carousel(lane), (0.9**k + 0.5**k) / 2)
    gru = throughtime.GRU(2, 2)
    assert insight.time_constants(insight.record(gru, torch.ones(4, 1, 2)).lanes[0]).shape == (2,)
    coupled = throughtime.LSTM(2, 2, coupled=True, peepholes=True)
    assert [g.name for g in insight.gate_use(insight.record(coupled, torch.ones(4, 1, 2)).lanes[0])] == [
        "input",
        "forget",
        "output",
    ]
    assert insight.carousel(insight.record(coupled, torch.ones(4, 1, 2)).lanes[0]).shape == (4,)
    with pytest.raises(InputError, match="no gate that keeps"):
        insight.time_constants(insight.record(throughtime.RNN(2, 2), torch.ones(4, 1, 2)).lanes[0])


@pytest.mark.parametrize("reverse", [False, True])
def test_the_carousel_is_a_product_within_a_sequence(reverse):
    reset = torch.zeros(5, 1, dtype=torch.bool)
    reset[3] = True
    lane = insight.record(
        make("lstm", bidirectional=True), torch.randn(5, 1, 3, dtype=torch.float64), reset=reset
    ).lanes[1 if reverse else 0]
    f = lane.saved_fields["f"][:, 0]
    pairs = [f[0] * f[1]] if reverse else [f[2] * f[1]]  # lag 2 lies within steps 0 … 2 only
    torch.testing.assert_close(insight.carousel(lane)[2], torch.stack(pairs).mean(), **CLOSE)
    assert insight.carousel(lane)[3].isnan()


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_two_paths_are_the_whole_gradient(cell, bidirectional):
    """The direct path by hand: multiply what enters by the keeping gate, step by step."""
    layer = make(cell, bidirectional=bidirectional)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    recording = insight.record(layer, x)
    grad_outputs = torch.randn_like(recording.outputs)
    unrolled = unroll(cell, layer, x)
    for row, (lane, split) in enumerate(zip(recording.lanes, insight.path_split(recording, grad_outputs), strict=True)):
        s, k = (2, 3) if lane.reverse else (4, 3)
        path = [s + j if lane.reverse else s - j for j in range(k + 1)]
        exact = torch.cat(state_gradients(unrolled, grad_outputs, s)[row][path[-1]], 1)
        grad_h = grad_outputs[s].chunk(2 if bidirectional else 1, dim=1)[row]
        fields = lane.saved_fields
        if cell == "lstm":
            direct = grad_h * fields["o"][s] * (1 - fields["tanh_c"][s] ** 2)
            for t in path[:-1]:
                direct = direct * fields["f"][t]
            direct = torch.cat([torch.zeros_like(direct), direct], 1)
        else:
            direct = grad_h
            for t in path[:-1]:
                direct = direct * (fields["z"][t] if "gru" in cell else 0)
        single = torch.zeros_like(grad_outputs)
        single[s] = grad_outputs[s]
        only = insight.path_split(recording, single)[row]
        steps_there = 6 - k  # losses that reach lag k; all but one are zero here
        for found, expected in zip(only, (exact, direct, exact - direct), strict=True):
            torch.testing.assert_close(found[k], expected.norm(dim=1).mean() / steps_there, **CLOSE)
        (curve,) = (m.curve for m in insight.lag_matrix(recording, grad_outputs)[row : row + 1])
        torch.testing.assert_close(split.total, curve)


def test_the_split_stays_within_a_sequence():
    reset = torch.rand(8, 3) < 0.3
    lengths = torch.tensor([8, 5, 0])
    recording = insight.record(make("gru", num_layers=2), torch.randn(8, 3, 3), lengths=lengths, reset=reset)
    grad_outputs = torch.randn_like(recording.outputs)
    (split,) = insight.path_split(recording, grad_outputs, lags=4)
    curve = insight.lag_matrix(recording, grad_outputs, lags=4)[-1].curve
    torch.testing.assert_close(split.total, curve, equal_nan=True)
