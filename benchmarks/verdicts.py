"""Whether verdicts are right: forty networks of known kind, each judged in windows of several lengths.

    python benchmarks/verdicts.py

A network's kind is known from plain autograd in float64, on noise of its own: whether the gradient of a loss falls below 1/1000
of its start within 200 steps, grows to ten times it, or does neither. Then it is judged as `throughtime gradients` does, in windows
that are too short, long enough and longer. A verdict is wrong if it is another
kind than what is known; "undecided" is none, and is counted where the window was long enough. Prints a table; exit code
1 where any is wrong.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.insight import Need, measure_finite
from throughtime.insight.report import make_layer, record_noise
from throughtime.insight.verdict import EXPLODED, NEEDED, VANISHED
from throughtime.layers import Recurrent

NETWORKS: list[tuple[str, str]] = [
    *(("rnn", f"orthogonal:{gain}") for gain in (0.5, 0.9, 1.0, 1.1, 1.4, 1.8, 2.5)),
    ("rnn", "default"),
    *(("rnn_relu", f"orthogonal:{gain}") for gain in (0.5, 1.0, 1.35, 1.5, 2, 3, 10, 30)),
    ("rnn_relu", "default"),
    *(("lstm", f"forget:{bias}") for bias in (-2, 0, 1, 2, 4, 6, 8)),
    *(("lstm", f"orthogonal:{gain}+forget:{bias}") for gain, bias in ((0.5, 5), (2, 1), (4, 3), (8, 5))),
    ("lstm", "default"),
    ("lstm", "chrono:200"),
    *(("gru", f"update:{bias}") for bias in (-2, 0, 1, 2, 5, 6, 8)),
    *(("gru", f"orthogonal:{gain}+update:{bias}") for gain, bias in ((0.5, 6), (2, 1))),
    ("gru", "default"),
    ("gru", "chrono:300"),
]
WINDOWS = (10, 50, 200, 400)
NEAR = "too near to another kind to be judged"
PROBES = 16
ROWS, MARGIN = 256, 2.0  # what a kind is known from, and how far from another kind a network must be to be judged


class Judged(NamedTuple):
    """A network, what is known of it, and what it was called."""

    cell: str
    init: str
    seed: int
    window: int
    known: str
    judged: str
    sentence: str

    @property
    def is_wrong(self) -> bool:
        """Whether it was called something else than what is known."""
        return self.judged not in (self.known, "undecided")

    @property
    def is_open(self) -> bool:
        """Whether it was called nothing though the window was long enough."""
        return self.judged == "undecided" and self.window >= NEEDED


def known_kind(cell: str, names: str, hidden: int, seed: int) -> tuple[str, float]:
    """Return what a network is within `NEEDED` steps, and how near it is to being another, as a factor.

    It is asked twice, from its first state and after it has left that; where the answers differ, the factor is 1.
    """
    torch.manual_seed(seed)
    layer = make_layer(cell, hidden, 1, names).double()
    torch.manual_seed(seed + 1000)
    first, later = (_kind_of(_exact_curve(layer, before)) for before in (0, 2 * NEEDED))
    return (first[0], min(first[1], later[1])) if first[0] == later[0] else (first[0], 1.0)


def _exact_curve(layer: Recurrent, before: int) -> Tensor:
    """Return φ_k / φ_0 of one loss by autograd in float64, `NEEDED` steps after `before` others."""
    with torch.no_grad():
        state = layer(torch.randn(before, ROWS, layer.input_size, dtype=torch.float64))[1] if before else None
    states = []
    for x in torch.randn(NEEDED, 1, ROWS, layer.input_size, dtype=torch.float64):
        _, state = layer(x, state)
        states.append((state,) if isinstance(state, Tensor) else state)
        for part in states[-1]:
            part.retain_grad()
    if not all(part.isfinite().all() for part in states[-1]):
        return torch.full((NEEDED,), math.inf)
    direction = torch.nn.functional.normalize(torch.randn_like(states[-1][0]), dim=2)
    (states[-1][0] * direction).sum().backward()
    norms = [torch.cat([_gradient(part) for part in parts], dim=2).norm(dim=2).mean() for parts in reversed(states)]
    return torch.stack(norms) / norms[0]


def _kind_of(curve: Tensor) -> tuple[str, float]:
    if not curve.isfinite().all():
        return "exploding", math.inf
    largest, smallest = curve.max().item(), curve.min().item()
    if largest >= EXPLODED:
        return "exploding", largest / EXPLODED
    nearest = min(EXPLODED / largest, max(smallest / VANISHED, VANISHED / max(smallest, 1e-300)))
    return ("vanishing" if smallest < VANISHED else "healthy"), nearest


def _gradient(part: Tensor) -> Tensor:
    return torch.zeros_like(part) if part.grad is None else part.grad


def judge_all(
    networks: Sequence[tuple[str, str]], hidden: int, seeds: Sequence[int], windows: Sequence[int]
) -> list[Judged]:
    """Judge every network in every window; one that is less than a factor of `MARGIN` from being of another kind is left out."""
    rows = []
    for cell, names in networks:
        for seed in seeds:
            known, margin = known_kind(cell, names, hidden, seed)
            if margin < MARGIN:
                continue
            for window in windows:

                def record(
                    dtype: torch.dtype, cell: str = cell, names: str = names, seed: int = seed, lags: int = window
                ):
                    torch.manual_seed(seed)
                    return record_noise(make_layer(cell, hidden, 1, names), lags + PROBES - 1, seed, dtype=dtype)

                measured = measure_finite(record, lags=window, probes=PROBES, agreement=False)
                found = measured.lanes[-1].judge(Need(), measured.overflow)
                rows.append(Judged(cell, names, seed, window, known, found.kind, found.sentence))
    return rows


def main() -> int:
    """Judge, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    rows: list[Judged] = []
    print(f"{'cell':9}{'init':26}{'seed':>4}  {'known':11}" + "".join(f"{f'{w} lags':17}" for w in WINDOWS))
    for cell, names in NETWORKS:
        for seed in range(1, given.seeds + 1):
            of_one = judge_all([(cell, names)], given.hidden, [seed], WINDOWS)
            told = "".join(f"{row.judged + ' WRONG' * row.is_wrong:17}" for row in of_one)
            print(f"{cell:9}{names:26}{seed:>4}  " + (f"{of_one[0].known:11}{told}" if of_one else NEAR), flush=True)
            rows += of_one
    wrong, left_open = (sum(getattr(row, name) for row in rows) for name in ("is_wrong", "is_open"))
    print(f"{len(NETWORKS)} networks, {given.seeds} seeds: {len(rows)} verdicts, {wrong} wrong", end="; ")
    print(f"{left_open} undecided in a window that was long enough")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
