"""The loss of a large vocabulary: the plain output layer and cross-entropy against the chunked one, in time and memory.

    python benchmarks/softmax.py

Forward and backward of one loss, the two interleaved; peak memory is that of a fresh process each. Loss and gradients are compared
first.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from throughtime.lm.loss import linear_cross_entropy

SHAPES = ((400, 200, 10_000), (700, 650, 10_000), (2048, 650, 10_000), (2048, 512, 50_000))  # (T·B, E, V)
DTYPES = (torch.float32, torch.bfloat16)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the loss from all logits at once."""
    return cross_entropy(linear(h, weight, bias).float(), targets)


LOSSES: dict[str, Loss] = {"plain": plain, "chunked": linear_cross_entropy}


def make(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw what a loss is made of."""
    torch.manual_seed(0)
    h, weight = torch.randn(rows, width), torch.randn(vocabulary, width) / width**0.5
    return (
        h.requires_grad_(),
        weight.requires_grad_(),
        torch.zeros(vocabulary).requires_grad_(),
        torch.randint(vocabulary, (rows,)),
    )


def step(loss: Loss, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return a loss and its gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(*tensors)
    return value, *torch.autograd.grad(value, tensors[:3])


def high_water() -> float:
    """Return the most memory that this process has had, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def peak(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Return by how many MB a first step of a fresh process raises its peak memory."""
    sizes = ",".join(map(str, shape))
    command = [sys.executable, __file__, name, sizes, str(dtype).removeprefix("torch.")]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    """Compare, time, print a table."""
    if len(sys.argv) == 4:
        tensors = make(*map(int, sys.argv[2].split(",")))
        before = high_water()
        step(LOSSES[sys.argv[1]], tensors, getattr(torch, sys.argv[3]))
        print(high_water() - before)
        return
    for shape in SHAPES:
        for dtype in DTYPES:
            tensors = make(*shape)
            expected, actual = (step(loss, tensors, dtype) for loss in LOSSES.values())
            tolerance = 1e-4 if dtype == torch.float32 else 1e-2
            for correct, given in zip(expected, actual, strict=True):
                assert (given - correct).norm() <= tolerance * correct.norm(), "the two disagree"
            took: dict[str, list[float]] = {name: [] for name in LOSSES}
            for _ in range(5):
                for name, loss in LOSSES.items():
                    began = time.perf_counter()
                    step(loss, tensors, dtype)
                    took[name].append(time.perf_counter() - began)
            figures = [
                f"{name} {statistics.median(took[name]) * 1e3:.0f} ms {peak(name, shape, dtype):.0f} MB"
                for name in LOSSES
            ]
            print(f"T·B {shape[0]}  E {shape[1]}  V {shape[2]:,}  {dtype}:  {'  '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
