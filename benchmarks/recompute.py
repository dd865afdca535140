"""What `recompute_every` costs in time and saves in memory: an LSTM's training step, with it and without, in turns.

Checked first: every gradient is the same to the bit. Memory is what the kernels hold after the forward pass, output included.

    python benchmarks/recompute.py [--threads 2] [--every 100]
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

import throughtime
from throughtime.kernels import native

SHAPES = [(16, 1000, 128), (64, 200, 256)]  # B, T, H


def main() -> None:
    parser = argparse.ArgumentParser(description="Time recomputation.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for batch, steps, hidden in SHAPES:
        torch.manual_seed(1)
        everything = throughtime.LSTM(hidden, hidden)
        frugal = throughtime.LSTM(hidden, hidden, recompute_every=options.every)
        frugal.load_state_dict(everything.state_dict())
        x, grad = torch.randn(steps, batch, hidden, requires_grad=True), torch.randn(steps, batch, hidden)

        def train(layer: throughtime.LSTM, x: Tensor = x, grad: Tensor = grad) -> tuple[list[Tensor], float, float]:
            """Return the gradients, seconds and megabytes."""
            start = time.perf_counter()
            output, _ = layer(x)
            megabytes = native.memory_use().used / 1e6
            gradients = torch.autograd.grad(output, [x, *layer.parameters()], grad)
            return list(gradients), time.perf_counter() - start, megabytes

        pairs = zip(train(everything)[0], train(frugal)[0], strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit("the gradients differ; not timed")
        turns = [(train(everything)[1:], train(frugal)[1:]) for _ in range(9)]
        seconds = [statistics.median(turn[i][0] for turn in turns) for i in (0, 1)]
        megabytes = [turns[-1][i][1] for i in (0, 1)]
        print(
            f"LSTM B{batch} T{steps} H{hidden}: everything kept {seconds[0] * 1e3:.0f} ms, {megabytes[0]:.0f} MB; "
            f"every {options.every}th state {seconds[1] * 1e3:.0f} ms, {megabytes[1]:.0f} MB; "
            f"{seconds[1] / seconds[0]:.2f} times as long"
        )


if __name__ == "__main__":
    main()
