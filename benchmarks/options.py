"""What each option, dtype and compiler costs: a training step against the plain float32 one of the same cell.

    python -m benchmarks.options [--cell lstm gru rnn] [--threads 1] [--turns 9] [--no-compile]

T 100, B 16, I 64, H 128. An option's output is checked against the equations, which are given the same masks, before it is timed.
All of a cell's are timed in turns, one thread by the processor's clock. Prints a line for each option and dtype: milliseconds,
times the plain float32 step, times the same option in float32, compiled times eager; then what is above its limit, the worst first.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime

STEPS, BATCH, INPUTS, HIDDEN = 100, 16, 64, 128
LAYERS: dict[str, Callable[..., Any]] = {"lstm": throughtime.LSTM, "gru": throughtime.GRU, "rnn": throughtime.RNN}
EVERY, GATED = ("lstm", "gru", "rnn"), ("lstm", "gru")


@dataclass(frozen=True)
class Option:
    """What a layer is made with and called with.

    Attributes:
        cells: Which have it.
        made: Arguments of the layer.
        called: Arguments of a call; "packed" and "last" say that the input is packed, and the loss on the last step alone.
    """

    cells: tuple[str, ...] = EVERY
    made: dict[str, Any] = field(default_factory=dict)
    called: tuple[str, ...] = ()


OPTIONS = {
    "plain": Option(),
    "lengths": Option(called=("lengths",)),
    "reset": Option(called=("reset",)),
    "mask": Option(called=("mask",)),
    "packed": Option(called=("packed",)),
    "loss on the last step": Option(called=("last",)),
    "token ids": Option(called=("ids",)),
    "embedded ids": Option(called=("ids", "embedding")),
    "both ways": Option(made={"bidirectional": True}),
    "projection": Option(("lstm",), {"proj_size": 64}),
    "recompute_every": Option(made={"recompute_every": 10}),
    "layer_norm": Option(made={"layer_norm": True}),
    "peepholes": Option(("lstm",), {"peepholes": True}),
    "coupled": Option(("lstm",), {"coupled": True}),
    "zoneout": Option(made={"zoneout": 0.1}),
    "recurrent_dropout": Option(made={"recurrent_dropout": 0.2}),
    "weight_drop": Option(made={"weight_drop": 0.2}),
    "reset_after=False": Option(("gru",), {"reset_after": False}),
}
VARIANTS = ("layer_norm", "peepholes", "coupled", "zoneout", "recurrent_dropout")

# How far an output may be from the equations' in the same dtype, of its largest value, in the first steps: what rounding a layer
# normalisation amplifies is a thousandth after a hundred.
TOLERANCE = {
    "float32": 1e-4,
    "float64": 1e-12,
    "bfloat16": 0.1,
    "bf16 autocast": 0.1,
    "float16": 1e-2,
    "f16 autocast": 1e-2,
}
COMPILED = ("float32", "bf16 autocast")


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """Return the context that a dtype is computed in."""
    kinds = {"bf16 autocast": torch.bfloat16, "f16 autocast": torch.float16}
    return torch.autocast("cpu", kinds[dtype]) if dtype in kinds else nullcontext()


class Step:
    """A training step with an option in a dtype."""

    def __init__(self, cell: str, option: Option, dtype: str) -> None:
        torch.manual_seed(1)
        self.dtype, self.option = dtype, option
        self.layer = LAYERS[cell](INPUTS, HIDDEN, **option.made)
        own = getattr(torch, dtype, torch.float32)
        self.layer.to(own)
        called = option.called
        x: Tensor = torch.randn(STEPS, BATCH, INPUTS).to(own).requires_grad_()
        lengths = torch.randint(STEPS // 4, STEPS + 1, (BATCH,))
        options: dict[str, Any] = {
            "lengths": lengths,
            "reset": torch.rand(STEPS, BATCH) < 1 / 32,
            "mask": torch.rand(STEPS, BATCH) < 0.75,
            "embedding": torch.randn(INPUTS, INPUTS).to(own).requires_grad_(),
        }
        self.options = {name: options[name] for name in called if name in options}
        self.input: Any = torch.randint(INPUTS, (STEPS, BATCH)) if "ids" in called else x
        if "packed" in called:
            self.input = pack_padded_sequence(x.detach(), lengths, enforce_sorted=False)
        self.forward: Callable[..., Any] = self.layer

    def output(self) -> Tensor:
        """Run the forward pass."""
        with autocast(self.dtype):
            output = self.forward(self.input, **self.options)[0]
        return output if isinstance(output, Tensor) else output.data

    def run(self) -> None:
        """Run both passes."""
        output = self.output()
        (output[-1] if "last" in self.option.called else output).sum().backward()

    def check(self) -> None:
        """Compare the output's first ten steps with the equations'."""
        outputs, chosen = [], self.layer.backend
        for backend in (chosen, "reference"):
            self.layer.backend = backend
            torch.manual_seed(3)
            outputs.append(self.output().detach().double())
        self.layer.backend = chosen
        first = 10 * BATCH if "packed" in self.option.called else 10
        ours, exact = (output[:first] for output in outputs)
        error = float((ours - exact).abs().max() / exact.abs().max())
        if not error <= TOLERANCE[self.dtype]:
            raise SystemExit(
                f"{self.layer} in {self.dtype} is {error:.1e} away from the equations; at most {TOLERANCE[self.dtype]:.0e}"
            )


def limit(option: str, dtype: str, has_bfloat16: bool) -> float | None:
    """Return what a step may cost at most, times the same option in float32."""
    if dtype == "float64":
        return 2.2
    if dtype.startswith("f"):
        return 1.3 if dtype != "float32" else None
    if option in VARIANTS:
        return 0.8 if has_bfloat16 else 1.3
    return 1.2 if option == "both ways" else None


def medians(steps: dict[Any, Step], turns: int) -> dict[Any, float]:
    """Time steps in turns; return seconds."""
    now = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    seconds: dict[Any, list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step.run()
    for _ in range(turns):
        for key, step in steps.items():
            start = now()
            step.run()
            step.run()
            seconds[key].append((now() - start) / 2)
    return {key: statistics.median(taken) for key, taken in seconds.items()}


def compiled_share(cell: str, option: Option, dtype: str, turns: int) -> float:
    """Return what a compiled step takes, times an eager one; each is compiled as the first of its kind."""
    torch._dynamo.reset()
    eager, compiled = Step(cell, option, dtype), Step(cell, option, dtype)
    compiled.forward = torch.compile(compiled.layer)
    taken = medians({"eager": eager, "compiled": compiled}, turns)
    return taken["compiled"] / taken["eager"]


def sweep(cell: str, turns: int, compiles: bool) -> list[tuple[float, str]]:
    """Print a cell's table; return what has a limit, as shares of it."""
    steps: dict[Any, Step] = {}
    for name, option in OPTIONS.items():
        for dtype in TOLERANCE if cell in option.cells else ():
            steps[name, dtype] = step = Step(cell, option, dtype)
            step.check()
    taken = medians(steps, turns)
    plain, judged = taken["plain", "float32"], []
    has_bfloat16 = "bf16" in throughtime.backends().get("native", "")
    print(f"\n{cell.upper():24}{'':14}      ms  × plain  × float32  compiled × eager")
    for (name, dtype), seconds in taken.items():
        by_float32 = seconds / taken[name, "float32"]
        most = limit(name, dtype, has_bfloat16)
        is_compiled = compiles and dtype in COMPILED and "packed" not in OPTIONS[name].called
        share = compiled_share(cell, OPTIONS[name], dtype, turns) if is_compiled else None
        line = f"{name:24}{dtype:14}{seconds * 1e3:8.2f}  {seconds / plain:7.2f}  {by_float32:9.2f}"
        print(line + (f"  {share:16.2f}" if share else ""), flush=True)
        if most is not None:
            judged.append((by_float32 / most, f"{cell} {name}, {dtype}: {by_float32:.2f} × float32, at most {most}"))
        if share:
            judged.append((share / 1.1, f"{cell} {name}, {dtype}: compiled {share:.2f} × eager, at most 1.1"))
    return judged


def main() -> int:
    """Sweep; the exit code says whether anything is above its limit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.options", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")  # of torch's, on its own float16 and compiler
    judged = [one for cell in given.cell for one in sweep(cell, given.turns, not given.no_compile)]
    worst = sorted(judged, reverse=True)
    print(f"\n{sum(share > 1 for share, _ in worst)} of {len(worst)} above their limits; the worst ten:")
    print(*(f"  {share:.2f} of it: {line}" for share, line in worst[:10]), sep="\n")
    return worst[0][0] > 1


if __name__ == "__main__":
    sys.exit(main())
