"""Layers against torch.nn at sampled shapes: where is ours the slower one?

    python -m benchmarks.sweep [--cell lstm …] [--points 200] [--threads 1] [--seed 0] [--plot sweep.png]

The grid of `benchmarks.speed` is what was tuned for; this is what people use: B 1 to 256, T 1 to 1000, I 1 to 512 and H 16 to 1024,
each drawn on a scale of its logarithm, one layer or two, training or inference. Each point is checked against float64 and timed in
turns with torch.nn. Prints each cell's geometric mean, how many points are below 0.95, and its worst ten; all points go to
bench-results/ as JSON. One thread is timed by the processor's clock, which other processes disturb less; for several, leave the
machine alone.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.speed.case import OURS, Contest, Contestant
from benchmarks.speed.problem import Problem
from benchmarks.speed.report import machine
from benchmarks.speed.timing import WrongAnswerError, check, take_turns

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MOST = 4e10  # floating-point operations a call: what takes longer is as fast as a product
ENOUGH = 0.95  # torch.nn's time over ours, below which a point is called slow
PEER = "torch.nn"


@dataclass(frozen=True)
class Point:
    """A layer and a call of it."""

    cell: str
    batch: int
    steps: int
    inputs: int
    hidden: int
    layers: int
    training: bool

    @property
    def operations(self) -> float:
        """Floating-point operations of a call's products; a backward pass has twice as many as the forward pass."""
        inputs = self.inputs + (self.layers - 1) * self.hidden
        forward = 2 * self.batch * self.steps * GATES[self.cell] * self.hidden * (inputs + self.layers * self.hidden)
        return forward * (3 if self.training else 1)

    def __str__(self) -> str:
        kind = "training" if self.training else "inference"
        return f"{self.cell} B{self.batch} T{self.steps} I{self.inputs} H{self.hidden} L{self.layers}, {kind}"


@dataclass(frozen=True)
class Timed:
    """A point's medians in seconds, or what is wrong with our answer."""

    point: Point
    ours: float = math.nan
    theirs: float = math.nan
    wrong: str = ""

    @property
    def ratio(self) -> float:
        """torch.nn's time over ours."""
        return self.theirs / self.ours


def points(cell: str, count: int, seed: int) -> Iterator[Point]:
    """Draw points whose calls aren't too long."""
    draw = random.Random(f"{cell} {seed}")
    while count:
        batch, steps, inputs, hidden = (
            round(math.exp(draw.uniform(math.log(low), math.log(high))))
            for low, high in ((1, 256), (1, 1000), (1, 512), (16, 1024))
        )
        point = Point(cell, batch, steps, inputs, hidden, draw.choice((1, 2)), draw.random() < 0.5)
        if point.operations <= MOST:
            count -= 1
            yield point


def time_one(point: Point, budget: float) -> Timed:
    """Check a point's answer, and time both."""
    problem = Problem(
        *(point.cell, point.steps, point.batch, point.hidden, point.training), layers=point.layers, inputs=point.inputs
    )
    contest = Contest(
        [Contestant(OURS, problem.by_us(), judged_by=PEER), Contestant(PEER, problem.by_torch())],
        problem.by_torch(torch.float64),
    )
    try:
        check(contest, contest.exact())
    except WrongAnswerError as error:
        return Timed(point, wrong=str(error))
    times = take_turns(contest.contestants, budget)
    return Timed(point, statistics.median(times[OURS]), statistics.median(times[PEER]))


def summary(cell: str, timed: list[Timed]) -> list[str]:
    """Say in lines how a cell has done."""
    right = sorted((it for it in timed if not it.wrong), key=lambda it: it.ratio)
    lines = [f"{cell}: wrong at {it.point}: {it.wrong}" for it in timed if it.wrong]
    for kind, own in (
        ("training", [it for it in right if it.point.training]),
        ("inference", [it for it in right if not it.point.training]),
    ):
        if not own:
            continue
        mean = math.exp(statistics.fmean(math.log(it.ratio) for it in own))
        slow = [it for it in own if it.ratio < ENOUGH and it.point.steps > 1]
        lines.append(
            f"{cell}, {kind}: {PEER} / ours {mean:.2f} (geometric mean of {len(own)} points), {len(slow)} below {ENOUGH} at T > 1; "
            f"the worst {own[0].ratio:.2f}"
        )
    lines += [f"  {it.ratio:5.2f}  {it.ours * 1e3:9.3f} ms  {it.point}" for it in right[:10]]
    return lines


def plot(timed: list[Timed], path: Path) -> None:
    """Draw each point's ratio over its operations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for cell, colour in zip(GATES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for training, marker in ((True, "o"), (False, "x")):
            own = [it for it in timed if it.point.cell == cell and it.point.training is training and not it.wrong]
            label = f"{cell.upper()}, {'training' if training else 'inference'}"
            where = [it.point.operations for it in own], [it.ratio for it in own]
            axes.scatter(*where, s=18, color=colour, marker=marker, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="floating-point operations a call",
        ylabel=f"{PEER}'s time / throughtime's",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Sweep; the exit code says whether an answer was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", choices=list(GATES), default=list(GATES))
    parser.add_argument("--points", type=int, default=200, help="for each cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a point, after three turns")
    parser.add_argument("--plot", type=Path, help="where to draw ratio over operations, a PNG")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    everything: list[Timed] = []
    for cell in given.cell:
        timed = []
        for number, point in enumerate(points(cell, given.points, given.seed), start=1):
            timed.append(time_one(point, given.budget))
            if sys.stderr.isatty():
                print(f"\r{cell} {number}/{given.points}", end="\r", file=sys.stderr)
        print(*summary(cell, timed), sep="\n", flush=True)
        everything += timed
    given.out.mkdir(exist_ok=True)
    path = given.out / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}.json"
    found = [asdict(it) for it in everything]
    about = machine() | {"threads": given.threads, "seed": given.seed}
    path.write_text(json.dumps({"machine": about, "points": found}, indent=1), encoding="utf-8")
    print(f"{path}: {len(everything)} points, {given.threads} thread{'s' * (given.threads > 1)}")
    if given.plot:
        plot(everything, given.plot)
    return any(it.wrong for it in everything)


if __name__ == "__main__":
    sys.exit(main())
