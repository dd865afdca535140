"""The initialisations set what they say, on torch's two biases and every layer and direction."""

import math

import pytest
import torch

import throughtime
from throughtime import init


@pytest.fixture
def lstm() -> throughtime.LSTM:
    return throughtime.LSTM(3, 64, 2, bidirectional=True)


def gate(layer, row: int, index: int, gates: int) -> torch.Tensor:
    weights = layer.all_weights[row]
    return (weights[2] + weights[3]).chunk(gates)[index]


def test_forget_bias_is_the_sum_of_both_biases(lstm):
    before = gate(lstm, 3, 0, 4).clone()
    assert init.forget_bias_(lstm, 1.5) is lstm
    for row in range(4):
        assert torch.equal(gate(lstm, row, 1, 4), torch.full((64,), 1.5))
    assert torch.equal(gate(lstm, 3, 0, 4), before)


def test_chrono_spreads_time_constants_up_to_the_lag(lstm):
    init.chrono_(lstm, 200)
    forget = torch.cat([gate(lstm, row, 1, 4) for row in range(4)])
    assert 0 <= forget.min() < 1.5
    assert math.log(150) < forget.max() <= math.log(199)
    assert torch.equal(gate(lstm, 2, 0, 4), -gate(lstm, 2, 1, 4))


@pytest.mark.parametrize("reset_after", [True, False])
def test_chrono_holds_a_grus_state(reset_after):
    layer = init.chrono_(throughtime.GRU(3, 64, reset_after=reset_after), 200)
    update = gate(layer, 0, 1, 3)
    assert update.min() >= 0
    assert math.log(100) < update.max() <= math.log(199)


def test_orthogonal_blocks(lstm):
    init.orthogonal_(lstm, gain=2.0)
    for row in lstm.all_weights:
        for block in row[1].detach().chunk(4):
            torch.testing.assert_close(block @ block.T, 4 * torch.eye(64), atol=1e-4, rtol=0)


def test_orthogonal_with_a_projection():
    layer = init.orthogonal_(throughtime.LSTM(3, 8, proj_size=5))
    for block in layer.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block.T @ block, torch.eye(5), atol=1e-5, rtol=0)


def test_what_cant_be_set_is_said():
    with pytest.raises(throughtime.InputError, match="no biases to set; make it with bias=True"):
        init.forget_bias_(throughtime.LSTM(3, 4, bias=False))
    with pytest.raises(throughtime.InputError, match="max_lag = 2; expected"):
        init.chrono_(throughtime.GRU(3, 4), 2)


def test_update_bias_keeps_the_state_of_a_gru():
    layer = throughtime.init.update_bias_(throughtime.GRU(3, 5, num_layers=2, bidirectional=True), 3.0)
    for _, _, bias_ih, bias_hh in layer.all_weights:
        assert (bias_ih + bias_hh)[5:10].tolist() == [3.0] * 5
        assert (bias_ih + bias_hh)[:5].abs().max() < 1


def test_initialisations_by_name_are_the_functions():
    def weights(make):
        torch.manual_seed(3)
        return [w for row in make(throughtime.LSTM(3, 5)).all_weights for w in row]

    init = throughtime.init
    for name, function in {
        "default": lambda layer: layer,
        "orthogonal": init.orthogonal_,
        "orthogonal:1.5": lambda layer: init.orthogonal_(layer, 1.5),
        "forget:2": lambda layer: init.forget_bias_(layer, 2.0),
        "chrono:200": lambda layer: init.chrono_(layer, 200),
        "orthogonal+forget:1": lambda layer: init.forget_bias_(init.orthogonal_(layer), 1.0),
    }.items():
        named = weights(lambda layer, name=name: init.initialise_(layer, name))
        assert all(torch.equal(a, b) for a, b in zip(named, weights(function), strict=True)), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chron:200", "did you mean 'chrono'"),
        ("update:3", "'update:3' is for GRU, not for LSTM"),
        ("forget:x", "'forget:x': expected a number after the colon"),
        ("chrono", "'chrono': expected a number after the colon"),
        ("chrono:2", "at least 3"),
        ("", "unknown initialisation ''"),
    ],
)
def test_what_is_no_initialisation_is_said(name, said):
    with pytest.raises(ValueError, match=said):
        throughtime.init.initialise_(throughtime.LSTM(3, 5), name)
