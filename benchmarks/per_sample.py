"""Gradients by sample: one pass over the batch under `vmap` against loops of single rows, and torch.func.grad against autograd.

    python benchmarks/per_sample.py [--threads N] [--turns N] [--input-size I]

Every gradient is compared first, in float64 and in float32. Then all are timed in turns; the least of each is reported.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import throughtime

BATCH, STEPS, HIDDEN = 64, 50, 128
LAYERS = {"LSTM": throughtime.LSTM, "GRU": throughtime.GRU}
ONE_PASS, FUNC_LOOP, AUTOGRAD_LOOP = "one pass, vmap(grad)", "a loop of func.grad", "a loop of autograd"
Gradients = Callable[[], list[Tensor]]


def contestants(layer: nn.Module, x: Tensor) -> dict[str, Gradients]:
    """Return the ways to each parameter's gradients by sample, (B, …)."""
    names, leaves = zip(*layer.named_parameters(), strict=True)
    parameters = tuple(p.detach() for p in leaves)

    def loss(parameters: tuple[Tensor, ...], row: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (row[:, None],))[0].square().sum()

    def joined(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]

    one_pass, of_row, rows = vmap(grad(loss), in_dims=(None, 1)), grad(loss), range(x.shape[1])
    return {
        ONE_PASS: lambda: list(one_pass(parameters, x)),
        FUNC_LOOP: lambda: joined([of_row(parameters, x[:, row]) for row in rows]),
        AUTOGRAD_LOOP: lambda: joined(
            [torch.autograd.grad(layer(x[:, row : row + 1])[0].square().sum(), leaves) for row in rows]
        ),
    }


def whole_batch(layer: nn.Module, x: Tensor) -> dict[str, Gradients]:
    """Return the ways to the gradients of the whole batch's loss."""
    names, leaves = zip(*layer.named_parameters(), strict=True)
    parameters = dict(zip(names, (p.detach() for p in leaves), strict=True))
    summed = grad(lambda p: functional_call(layer, p, (x,))[0].square().sum())
    return {
        "the batch, func.grad": lambda: list(summed(parameters).values()),
        "the batch, autograd": lambda: list(torch.autograd.grad(layer(x)[0].square().sum(), leaves)),
    }


def check(ways: dict[str, Gradients], tolerance: float) -> None:
    """Refuse gradients that differ, relative to the largest of their parameter."""
    first, *others = [way() for way in ways.values()]
    for other in others:
        for a, e in zip(first, other, strict=True):
            error = float((a - e).abs().max() / e.abs().max())
            if not error <= tolerance:
                raise SystemExit(f"gradients differ by {error:.1e} of their largest; nothing is timed")


def least(ways: dict[str, Gradients], turns: int) -> dict[str, float]:
    """Return the least time of each, in milliseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: min(taken) for name, taken in times.items()}


def main() -> None:
    """Check, time and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--input-size", type=int, default=HIDDEN)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"B {BATCH}, T {STEPS}, H {HIDDEN}, I {given.input_size}, float32, {given.threads} threads; ms")
    for name, kind in LAYERS.items():
        torch.manual_seed(0)
        layer, x = kind(given.input_size, HIDDEN), torch.randn(STEPS, BATCH, given.input_size)
        for make in (contestants, whole_batch):
            check(make(layer.double(), x.double()), 1e-12)
            ways = make(layer.float(), x)
            check(ways, 1e-5)
            times = least(ways, given.turns)
            first = next(iter(times.values()))
            for way, taken in times.items():
                print(f"{name:5} {way:22} {taken:8.2f}   {taken / first:5.2f} ×")


if __name__ == "__main__":
    main()
