"""How far gradients reach at the start, small: the whole table is benchmarks/gradient_horizons.py."""

import math

import pytest
import torch

import throughtime
from throughtime import insight

STEPS, BATCH, HIDDEN = 80, 4, 48


def reach(layer):
    recording = insight.record(layer, torch.randn(STEPS, BATCH, 8))
    gradient = torch.nn.functional.normalize(torch.randn(STEPS, BATCH, HIDDEN), dim=2)
    (lag,) = insight.lag_matrix(recording, gradient, probes=1)
    return insight.horizon(lag, 1e-3).lag, (lag.curve[60] / lag.curve[0]).item()


@pytest.mark.parametrize(
    ("kind", "names", "low", "high"),
    [
        ("RNN", "default", 8, 16),
        ("RNN", "orthogonal", 28, 75),
        ("LSTM", "default", 9, 16),
        ("LSTM", "forget:1", 25, 45),
        ("LSTM", "forget:3", math.inf, math.inf),
        ("LSTM", "chrono:200", math.inf, math.inf),
        ("GRU", "default", 10, 18),
        ("GRU", "update:3", math.inf, math.inf),
    ],
)
def test_horizons_at_the_start(kind, names, low, high):
    layer = throughtime.init.initialise_(getattr(throughtime, kind)(8, HIDDEN), names)
    assert low <= reach(layer)[0] <= high


def test_a_large_recurrent_gain_explodes():
    horizon, at_60 = reach(throughtime.init.orthogonal_(throughtime.RNN(8, HIDDEN), 1.6))
    assert horizon == math.inf
    assert at_60 > 5
