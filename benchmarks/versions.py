"""Two installations of throughtime in turns: is anything slower than before?

    python benchmarks/versions.py BEFORE AFTER [--threads 1] [--turns 9] [--match lstm]

BEFORE and AFTER are the Python interpreters of two environments, each with its own throughtime; nothing of the project is read but
what layers have always had. Each case is run in both, turn by turn; a figure is the ratio of medians, after over before. One thread
is timed by the processor's clock. For several, leave the machine alone and set OMP_WAIT_POLICY=passive: else torch's threads of one
installation spin in the other's turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any

SLOWER = 1.03  # from which a case counts as slower
SETTLE = 0.01  # seconds before a turn, in which the other installation's waiting threads stop spinning
GRID = [(1, 100, 128), (1, 100, 512), (32, 100, 128), (64, 128, 256), (32, 128, 512), (16, 1000, 128)]
CELLS = ("LSTM", "GRU", "RNN")

# What an interpreter runs: a case a line on stdin, its seconds on stdout.
SERVED = r"""
import sys, time, torch, throughtime
threads = int(sys.argv[1])
torch.set_num_threads(threads)
now = time.perf_counter if threads > 1 else time.process_time
def made(cell, batch, steps, inputs, hidden, how, options):
    torch.manual_seed(0)
    layer = getattr(throughtime, cell)(inputs, hidden, **options)
    x, autocast = torch.randn(steps, batch, inputs, requires_grad=how != "inference"), how == "bf16"
    def run():
        with torch.set_grad_enabled(how != "inference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)[0]
        if how != "inference":
            output.sum().backward()
    return run
for line in sys.stdin:
    if line.startswith("case"):
        run = made(*eval(line[4:]))
        times = []
        for _ in range(4):
            start = now()
            run()
            times.append(max(now() - start, 1e-9))
        repeats = max(1, int(0.02 / min(times)))
    start = now()
    for _ in range(repeats):
        run()
    print((now() - start) / repeats, flush=True)
"""


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name what is run, and say it."""
    for how in ("training", "inference", "bf16"):
        for cell in CELLS:
            for batch, steps, hidden in GRID:
                yield f"{cell} B{batch} T{steps} H{hidden}, {how}", (cell, batch, steps, hidden, hidden, how, {})
    for cell in CELLS:
        yield f"{cell} B4 T20 I16 H32, the smallest, training", (cell, 4, 20, 16, 32, "training", {})
        for options in ({"bidirectional": True}, {"layer_norm": True}, {"zoneout": 0.2}, {"recurrent_dropout": 0.2}):
            yield f"{cell} B16 T100 I64 H128, {options}", (cell, 16, 100, 64, 128, "training", options)
    for options in ({"proj_size": 64}, {"peepholes": True}, {"coupled": True}):
        yield f"LSTM B16 T100 I64 H128, {options}", ("LSTM", 16, 100, 64, 128, "training", options)


class Installation:
    """An interpreter that is asked for one case's time after the other."""

    def __init__(self, python: str, threads: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(Path(python).absolute()), "-c", SERVED, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
        )

    def seconds(self, line: str) -> float:
        """Return the seconds of a run of the case in `line`, or, for an empty one, of the last case."""
        into: IO[str] | None = self._process.stdin
        out: IO[str] | None = self._process.stdout
        assert into is not None
        assert out is not None
        time.sleep(SETTLE)
        print(line, file=into, flush=True)
        answer = out.readline()
        if not answer:
            raise SystemExit(f"an interpreter ended with exit code {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the interpreter."""
        self._process.kill()
        self._process.communicate()


def compare(both: list[Installation], chosen: list[tuple[str, tuple[Any, ...]]], turns: int) -> list[str]:
    """Print each case's ratio and times; return the names of those that are slower."""
    slower = []
    for name, case in chosen:
        for one in both:
            one.seconds(f"case{case!r}")
        times = [[one.seconds("") for one in both] for _ in range(turns)]
        before, after = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"{after / before:6.3f}  {before * 1e3:9.3f}  {after * 1e3:9.3f} ms  {name}", flush=True)
        if after / before > SLOWER:
            slower.append(name)
    return slower


def main() -> int:
    """Compare; the exit code says whether a case is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="the interpreter of one environment")
    parser.add_argument("after", help="and of the other")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    given = parser.parse_args()
    with ExitStack() as open_ones:
        both = [
            open_ones.enter_context(closing(Installation(python, given.threads)))
            for python in (given.before, given.after)
        ]
        slower = compare(both, [case for case in cases() if given.match in case[0]], given.turns)
    print(f"{len(slower)} slower by more than {SLOWER - 1:.0%}" + "".join(f"\n  {name}" for name in slower))
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
