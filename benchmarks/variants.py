"""Time the LSTM's variants, forward and backward, beside the plain one and a layer-normalised LSTM written in eager torch.

Checked first: the layer-normalised output may err at most 3 times what eager torch's does, both against float64. All run in
turns; figures are medians. The eager peer has its input product and normalisation outside the loop. On a quiet machine:

    python benchmarks/variants.py [--threads 2] [--seconds 12]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import throughtime

T, B, H = 100, 32, 128


class EagerLayerNormLSTM(nn.Module):
    """The equations of `throughtime.LSTM(layer_norm=True)`, one step after another."""

    def __init__(self, layer: throughtime.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, shift_c = self.layer.all_weights[0]
        inputs = nn.functional.layer_norm(x @ w_ih.T, (4 * H,), gain_ih, b_ih)
        h = c = x.new_zeros(B, H)
        outputs = []
        for w in inputs:
            i, f, g, o = (w + nn.functional.layer_norm(h @ w_hh.T, (4 * H,), gain_hh, b_hh)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(nn.functional.layer_norm(c, (H,), gain_c, shift_c))
            outputs.append(h)
        return torch.stack(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the LSTM's variants.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=12.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    x, grad = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
    layers = {
        "plain": throughtime.LSTM(H, H),
        "layer_norm": throughtime.LSTM(H, H, layer_norm=True),
        "peepholes": throughtime.LSTM(H, H, peepholes=True),
        "coupled": throughtime.LSTM(H, H, coupled=True),
        "zoneout": throughtime.LSTM(H, H, zoneout=0.1),
        "recurrent_dropout": throughtime.LSTM(H, H, recurrent_dropout=0.2),
        "weight_drop": throughtime.LSTM(H, H, weight_drop=0.2),
    }
    eager = EagerLayerNormLSTM(layers["layer_norm"])
    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(x.double())
        honest, error = ((o - exact).abs().max().item() for o in (eager(x), layers["layer_norm"](x)[0]))
    if not error <= 3 * honest:
        raise SystemExit(f"error {error:.2e} against eager torch's {honest:.2e}; not timed")
    runs: dict[str, Callable[[], Tensor]] = {name: lambda layer=layer: layer(x)[0] for name, layer in layers.items()}
    runs["eager torch, layer_norm"] = lambda: eager(x)

    def seconds(run: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        run().backward(grad)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        seconds(run)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        for name, run in runs.items():
            times[name].append(seconds(run))
    plain = statistics.median(times["plain"])
    print(f"LSTM B{B} T{T} H{H}, training, {options.threads} threads, {len(times['plain'])} turns")
    for name, of_run in times.items():
        median = statistics.median(of_run)
        print(f"{name:24} {median * 1e3:7.2f} ms   {median / plain:5.2f} × plain")


if __name__ == "__main__":
    main()
