"""A contest is held: each contestant checked, and those who are right timed; what fails is noted, and the rest goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu.contest import (
    FAILED,
    LEFT_OUT,
    RIGHT,
    WRONG,
    Contest,
    Contestant,
    Figure,
    Passes,
    answer,
    errors,
    judge,
)
from benchmarks.gpu.problem import DOUBLE
from benchmarks.gpu.timing import Pace, TooSlowError, at_most, reason, synchronise, take_turns


@dataclass
class Row:
    """What came of a contestant.

    Attributes:
        contestant: Its name.
        numerics: What it computes in.
        is_ours: Whether throughtime computes it.
        status: `RIGHT`, `WRONG`, `FAILED` or `LEFT_OUT`.
        reason: Why it isn't right, or "".
        error: The largest error of its results, relative to the largest exact value.
        judged_by: Whose error its own is compared with, or "".
        times_judge: The largest ratio of the two.
        forward: Milliseconds of a pass without gradients, turn by turn.
        training: The same of a forward and a backward pass.
    """

    contestant: str
    numerics: str
    is_ours: bool
    status: str = LEFT_OUT
    reason: str = ""
    error: float | None = None
    judged_by: str = ""
    times_judge: float | None = None
    forward: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A figure made of medians: how many times ours goes into the fastest peer's time, or the other way round.

    Attributes:
        ours: The contestant.
        peer: The fastest in training of those that were to be compared with.
        forward: Of the passes without gradients.
        training: Of forward and backward.
        target: What the latter should be, with ≥ or ≤, or "".
        reached: Whether it is; `None` where nothing was asked.
    """

    ours: str
    peer: str
    forward: float
    training: float
    target: str
    reached: bool | None


def hold(contest: Contest, device: torch.device, pace: Pace, unprepared: Mapping[str, str] | None = None) -> list[Row]:
    """Check a contest's contestants, then time those who are right.

    Args:
        contest: Who computes what.
        device: Where.
        pace: How much time is spent.
        unprepared: Under which names peers' compilation was given up, and why.
    """
    rows = {one.name: Row(one.name, one.numerics.name, one.is_ours) for one in contest.contestants}
    passes: dict[str, Passes] = {}
    found: dict[str, list[float]] = {}
    exact = cache(lambda build: _exact(build, device))
    for one in sorted(contest.contestants, key=lambda one: one.judged_by is not None):  # first those who judge
        row = rows[one.name]
        row.reason = one.missing or ("" if one.is_ours else (unprepared or {}).get(one.compiles, ""))
        if row.reason:
            continue
        try:
            with at_most(pace.check, "its check"), one.numerics.in_force():
                right = exact(one.exact or contest.exact)
                passes[one.name] = one.build()
                found[one.name] = errors(answer(passes[one.name]), right)
                synchronise(device)
        except Exception as error:  # anybody's, of any kind
            row.status = LEFT_OUT if isinstance(error, NotImplementedError | TooSlowError) else FAILED
            row.reason = reason(error)
            continue
        _pronounce(row, one, found, contest.names())
    exact.cache_clear()
    contestants = [one for one in contest.contestants if rows[one.name].status == RIGHT]
    for mode in ("forward", "training"):
        runs = {one.name: (getattr(passes[one.name], mode), one.numerics) for one in contestants}
        for name, times in take_turns(runs, device, pace).items():
            if isinstance(times, str):
                rows[name].status, rows[name].reason = FAILED, times
            else:
                setattr(rows[name], mode, times)
    return list(rows.values())


def _exact(build: Callable[[], Passes], device: torch.device) -> list[Tensor]:
    with DOUBLE.in_force():
        results = answer(build())
        synchronise(device)
    return results


def _pronounce(row: Row, one: Contestant, found: Mapping[str, list[float]], names: Sequence[str]) -> None:
    """Note a verdict in a contestant's row; who has no judge left is judged as a peer."""
    judges = found.get(one.judged_by or "")
    verdict = judge(one, found[one.name], judges, names)
    row.error, row.times_judge = verdict.error, verdict.times_judge
    row.judged_by = (one.judged_by or "") if judges else ""
    row.status, row.reason = (WRONG, verdict.wrong) if verdict.wrong else (RIGHT, "")


def lines(rows: Sequence[Row], figures: Sequence[Figure], has_targets: bool) -> list[Line]:
    """Make the figures of those who were timed; targets are for full sizes on a GPU."""
    timed = {row.contestant: row for row in rows if row.status == RIGHT and row.training and row.forward}
    made = []
    for figure in figures:
        peers = [timed[name] for name in figure.peers if name in timed]
        if figure.ours not in timed or not peers:
            continue
        ours, peer = timed[figure.ours], min(peers, key=lambda row: median(row.training))
        forward, training = (median(theirs) / median(own) for theirs, own in _pairs(peer, ours))
        target, reached = "", None
        if figure.at_most is not None:
            forward, training = 1 / forward, 1 / training
            target, reached = f"≤ {figure.at_most:g}", training <= figure.at_most if has_targets else None
        elif figure.target is not None:
            target, reached = f"≥ {figure.target:g}", training >= figure.target if has_targets else None
        made.append(Line(ours.contestant, peer.contestant, forward, training, target, reached))
    return made


def _pairs(peer: Row, ours: Row) -> list[tuple[list[float], list[float]]]:
    return [(peer.forward, ours.forward), (peer.training, ours.training)]
