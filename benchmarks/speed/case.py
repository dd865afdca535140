"""What is measured: a case has contestants, which are timed in turns, and figures, which are made of their times."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Results = list[Tensor]
OURS = "throughtime"
HONEST = "the equations"


def as_they_are(results: Any) -> Results:
    """Return the results of a contestant that computes with torch."""
    return results


@dataclass(frozen=True)
class Contestant:
    """Somebody who computes the case's answer.

    Attributes:
        name: As the table shows it.
        run: Compute once; the only thing that is timed.
        read: Turn what `run` returned into the tensors that are compared with the exact ones.
        judged_by: Whose error this one's may exceed at most three times: another contestant, or `HONEST`; `None` for a peer,
            which need only be right.
        exact: Its own answer in float64, where it isn't the contest's.
        around: What to enter while this one is timed.
    """

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], Results] = as_they_are
    judged_by: str | None = None
    exact: Callable[[], Results] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Contest:
    """A case made ready to run.

    Attributes:
        contestants: In the order of their turns.
        exact: The answer in float64.
        absent: Contestants that can't take part, and why.
        honest: Answers of the equations in the contestants' dtype, never timed: the judges where a computation amplifies
            rounding so much that an honest peer errs by more than a fixed share of the answer. How much one alone errs is chance.
        block: Seconds that one contestant's turn takes at least.
    """

    contestants: Sequence[Contestant]
    exact: Callable[[], Results]
    absent: Mapping[str, str] = field(default_factory=dict)
    honest: Sequence[Callable[[], Results]] = ()
    block: float = 0.02


@dataclass(frozen=True)
class Figure:
    """A number made of the contestants' times, and what it should be.

    Attributes:
        name: As the table shows it.
        needs: Contestants whose times it is made of.
        value: From those times in seconds, in the order of `needs`.
        target: What to reach, or `None`.
        at_most: Whether the figure should stay below its target instead of above.
    """

    name: str
    needs: tuple[str, ...]
    value: Callable[..., float]
    target: float | None = None
    at_most: bool = False

    def reached(self, value: float) -> bool | None:
        """Return whether a value is as good as the target, `None` without one."""
        if self.target is None:
            return None
        return value <= self.target if self.at_most else value >= self.target


def times_faster(peer: str, target: float | None = None, ours: str = OURS) -> Figure:
    """Return the figure "peer's time / ours"."""
    return Figure(f"{peer} / {ours}", (peer, ours), lambda theirs, own: theirs / own, target)


def times_slower(ours: str, other: str, at_most: float | None = None, share: float = 1.0) -> Figure:
    """Return the figure "our time / (the other's · share)", which should be small."""
    name = f"{ours} / {other}" if share == 1 else f"{ours} / ({share:.2f} × {other})"
    return Figure(name, (ours, other), lambda own, theirs: own / (theirs * share), at_most, at_most=True)


@dataclass(frozen=True)
class Case:
    """One line of the programme.

    Attributes:
        group: Which part of the programme it belongs to.
        cell: "lstm", "gru" or "rnn".
        name: What is computed.
        build: Make the contestants, for torch's present number of threads.
        figures: What is made of their times.
        is_quick: Whether `--quick` includes it.
        is_threaded: Whether it says something only with all threads.
        missing: Why it can't run yet, or `None`.
    """

    group: str
    cell: str
    name: str
    build: Callable[[], Contest]
    figures: Sequence[Figure]
    is_quick: bool = False
    is_threaded: bool = False
    missing: str | None = None
