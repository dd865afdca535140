"""Time one layer, forward and backward, against torch.nn: padded, and with a PackedSequence where lengths vary.

Each case is checked before it is timed: outputs and every gradient against float64, with torch's own error as the
measure. Ours and the peer run in turns; the figure is the median, over turns, of peer's time / ours. On a quiet machine:

    python benchmarks/kernels.py [--threads 1 2] [--case grid|ragged] [--turns 15] [--json bench-results/kernels.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from throughtime.kernels import cpu

GRID = [(1, 100, 128), (1, 100, 512), (32, 100, 128), (64, 128, 256), (32, 128, 512), (64, 50, 1024), (16, 1000, 128)]
RAGGED = [(32, 100, 128), (64, 60, 256)]
MODULES: dict[str, Callable[[int, int], torch.nn.RNNBase]] = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
}


@dataclass(frozen=True)
class Case:
    """One measurement: I = H, `is_ragged` for lengths uniform in [5, T]."""

    cell: str
    batch: int
    steps: int
    hidden: int
    is_ragged: bool
    is_training: bool

    def __str__(self) -> str:
        kind = "packed" if self.is_ragged else "padded"
        mode = "train" if self.is_training else "infer"
        return f"{self.cell:8} B{self.batch:<3} T{self.steps:<4} H{self.hidden:<4} {kind} {mode}"


class Problem:
    """Tensors of a case, and the two ways to run it."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.case = case
        torch.manual_seed(1)
        self.module = MODULES[case.cell](case.hidden, case.hidden).to(dtype)
        self.parameters: list[Tensor] = list(self.module.parameters())
        shape = (case.steps, case.batch, case.hidden)
        self.input = torch.randn(shape, generator=generator).to(dtype).requires_grad_(case.is_training)
        self.grad = torch.randn(shape, generator=generator).to(dtype)
        lengths = torch.randint(5, case.steps + 1, (case.batch,), generator=generator)
        self.lengths = lengths if case.is_ragged else None
        self.initial = [torch.zeros(case.batch, case.hidden, dtype=dtype)] * (2 if case.cell == "lstm" else 1)

    def run_torch(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.case.is_training):
            output = self._torch_output()
        if not self.case.is_training:
            return [output]
        return [output.detach(), *torch.autograd.grad(output, [self.input, *self.parameters], self.grad)]

    def _torch_output(self) -> Tensor:
        if self.lengths is None:
            return self.module(self.input)[0]
        packed, _ = self.module(pack_padded_sequence(self.input, self.lengths, enforce_sorted=False))
        return pad_packed_sequence(packed, total_length=self.case.steps)[0]

    @torch.no_grad()
    def run_ours(self) -> list[Tensor]:
        case = self.case
        output, final, saved = cpu.forward(
            case.cell, self.input, self.initial, self.parameters, self.lengths, keep=case.is_training
        )
        if not case.is_training:
            return [output]
        no_grad = [torch.zeros_like(s) for s in final]
        gradient = cpu.backward(
            case.cell, self.grad, no_grad, self.input, self.initial, self.parameters, output, saved, self.lengths
        )
        assert gradient.input is not None
        return [output, gradient.input, *gradient.parameters]


def check(case: Case) -> None:
    """Refuse to time a wrong answer: at most 3 times torch's own float32 error, both against float64."""
    problem = Problem(case)
    truth, theirs, ours = Problem(case, torch.float64).run_torch(), problem.run_torch(), problem.run_ours()
    for right, their, our in zip(truth, theirs, ours, strict=True):
        error, honest = float((our - right).abs().max()), float((their - right).abs().max())
        if not error <= 3 * honest:
            raise SystemExit(f"{case}: error {error:.2e} against torch's {honest:.2e}; not timed")


def time_once(run: Callable[[], object], repeats: int) -> float:
    """Seconds a run: by the clock, and with one thread by the processor's time, which other processes disturb less."""
    now = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    start = now()
    for _ in range(repeats):
        run()
    return (now() - start) / repeats


def measure(case: Case, turns: int, budget: float) -> dict[str, float]:
    """Median times, and the quartiles of the ratios of neighbouring turns."""
    problem = Problem(case)
    for run in (problem.run_torch, problem.run_ours):
        run()
    once = max(time_once(problem.run_torch, 1), time_once(problem.run_ours, 1))
    repeats = max(1, int(0.02 / once))
    turns = max(3, min(turns, int(budget / (2 * repeats * once))))
    pairs = [(time_once(problem.run_torch, repeats), time_once(problem.run_ours, repeats)) for _ in range(turns)]
    low, middle, high = statistics.quantiles([theirs / ours for theirs, ours in pairs], n=4)
    return {
        "torch_ms": statistics.median(theirs for theirs, _ in pairs) * 1e3,
        "ours_ms": statistics.median(ours for _, ours in pairs) * 1e3,
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "turns": turns,
    }


def cases(kinds: list[str], cells: list[str], modes: list[str]) -> list[Case]:
    shapes = [(*shape, False) for shape in GRID if "grid" in kinds] + [(*s, True) for s in RAGGED if "ragged" in kinds]
    return [
        Case(cell, batch, steps, hidden, is_ragged, mode == "train")
        for cell in cells
        for batch, steps, hidden, is_ragged in shapes
        for mode in modes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the native kernels against torch.nn.")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--case", nargs="+", choices=["grid", "ragged"], default=["grid", "ragged"])
    parser.add_argument("--cell", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--mode", nargs="+", choices=["train", "infer"], default=["train"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    print(f"torch {torch.__version__}, {cpu.instruction_set()}, {platform.machine()}; ratio = torch's time / ours")
    for case in cases(options.case, options.cell, options.mode):
        torch.set_num_threads(max(options.threads))
        check(case)
        for threads in options.threads:
            torch.set_num_threads(threads)
            figures = measure(case, options.turns, options.budget)
            results.append({**asdict(case), "threads": threads, **figures})
            print(
                f"{case} {threads} threads: torch {figures['torch_ms']:8.2f} ms, ours {figures['ours_ms']:8.2f} ms, "
                f"ratio {figures['ratio']:5.2f} [{figures['ratio_low']:.2f} {figures['ratio_high']:.2f}]",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
