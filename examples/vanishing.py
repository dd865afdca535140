"""Vanishing gradients, seen in ten lines: how far back the gradient of a loss reaches.

    python examples/vanishing.py

Each layer reads noise, and losses hang on its outputs. Its reach is the number of steps after which less than a thousandth of a
loss's gradient is left in the state, with a 95 % interval over 16 sequences.
"""

import torch

import throughtime
from throughtime import insight

torch.manual_seed(1)
x, losses = torch.randn(400, 16, 32), torch.randn(400, 16, 64)  # (T, B, I), and ∂L_t/∂h_t (T, B, H)
lstm = throughtime.LSTM(32, 64)
layers = {"RNN": throughtime.RNN(32, 64), "GRU": throughtime.GRU(32, 64), "LSTM": lstm}
layers["LSTM, forget bias 1"] = throughtime.init.forget_bias_(throughtime.LSTM(32, 64), 1.0)
layers["LSTM, chrono 200"] = throughtime.init.chrono_(throughtime.LSTM(32, 64), max_lag=200)
print(f"steps until less than 0.001 of the gradient is left, and a 95 % interval; inf is beyond the {len(x)} steps:")
for name, layer in layers.items():
    (lag,) = insight.lag_matrix(insight.record(layer, x), losses, probes=16)
    reach = insight.horizon(lag, 0.001)
    print(f"  {name:22}{reach.lag:5}   ({reach.low} to {reach.high})")
