"""Who computes the same, in what numerics, and whether an answer is right."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OURS = "throughtime"
FACTOR = 3  # times its judge's error that an answer on trial may err
RIGHT, WRONG, FAILED, LEFT_OUT = "right", "WRONG", "failed", "left out"


@dataclass(frozen=True)
class Numerics:
    """What is computed in.

    Attributes:
        name: As the table shows it.
        dtype: Of parameters, input and output.
        tf32: Whether products of float32 may be taken in TF32, by cuDNN, cuBLAS and whoever asks torch.
        worst: Relative error from which a peer computes something else.
        floor: Relative error that is forgiven where the judge errs by less; 0 for two units in the last place of `dtype`.
    """

    name: str
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    worst: float = 1e-3
    floor: float = 0.0

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Allow or forbid TF32 everywhere, for as long as this lasts."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


FLOAT32 = Numerics("float32")
TF32 = Numerics("TF32", tf32=True, worst=3e-2, floor=2**-11)  # a judge who may use it needn't do so
BFLOAT16 = Numerics("bfloat16", torch.bfloat16, worst=0.2)
FLOAT16 = Numerics("float16", torch.float16, worst=3e-2)


class Passes(NamedTuple):
    """What a contestant runs: `forward` without gradients, and `training`, which adds those of input and parameters.

    Both return tensors in the contestant's own layout; `read` brings them to (T, B, ·).
    """

    forward: Callable[[], list[Tensor]]
    training: Callable[[], list[Tensor]]
    read: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass(frozen=True)
class Contestant:
    """Somebody who computes a contest's answer.

    Attributes:
        name: As the table shows it.
        numerics: What it computes in.
        build: Make its passes.
        judged_by: The contestant whose error this one's may exceed at most `FACTOR` times; `None` for a peer, which need only
            be right.
        exact: Its own answer in float64, where it isn't the contest's.
        missing: Why it can't take part here, or `None`.
        compiles: Under which name its compilation is prepared; "" where nothing is compiled.
    """

    name: str
    numerics: Numerics
    build: Callable[[], Passes]
    judged_by: str | None = None
    exact: Callable[[], Passes] | None = None
    missing: str | None = None
    compiles: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether throughtime computes it."""
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Figure:
    """A ratio of times, and what it should be in training.

    Attributes:
        ours: Whose time.
        peers: Against the fastest of these.
        target: What peers' time / ours should reach, or `None`.
        at_most: What ours / peers' should stay below, instead.
    """

    ours: str
    peers: Sequence[str]
    target: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Contest:
    """Contestants of one task, and figures made of their times.

    Attributes:
        title: What is computed.
        contestants: In the order of their turns.
        exact: The answer in float64.
        names: Say what the results of training are called: output, gradients of input and parameters.
        figures: Ratios, of those that were timed.
    """

    title: str
    contestants: Sequence[Contestant]
    exact: Callable[[], Passes]
    names: Callable[[], Sequence[str]]
    figures: Sequence[Figure]


class Verdict(NamedTuple):
    """Whether an answer is right.

    `error` is the largest of its results, relative to the largest exact value; `times_judge` the largest ratio to the judge's.
    """

    error: float
    times_judge: float | None = None
    wrong: str | None = None


def answer(passes: Passes) -> list[Tensor]:
    """Run both passes: the output without gradients, then that of training and the gradients, in float64."""
    return [t.double() for t in [*passes.read(passes.forward()), *passes.read(passes.training())]]


def errors(given: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return each result's largest error, relative to the largest exact value; infinite where a shape or a number is none."""
    if len(given) != len(exact):
        raise ValueError(f"{len(given)} results were given, {len(exact)} expected")
    found = []
    for one, right in zip(given, exact, strict=True):
        if one.shape != right.shape:
            raise ValueError(f"a result is {tuple(one.shape)}, expected {tuple(right.shape)}")
        largest = float((one - right).abs().max()) / max(float(right.abs().max()), 1e-30)
        found.append(largest if largest == largest else float("inf"))
    return found


def judge(one: Contestant, own: Sequence[float], judges: Sequence[float] | None, names: Sequence[str]) -> Verdict:
    """Judge a contestant's errors by its judge's, which have a floor; a peer's by what is sane."""
    floor = one.numerics.floor or 2 * torch.finfo(one.numerics.dtype).eps
    labels = [f"{names[0]} without gradients", *names]
    if judges is None:
        allowed, times = [one.numerics.worst] * len(own), None
    else:
        honest = [max(floor, error) for error in judges]
        allowed, times = [FACTOR * error for error in honest], max(o / h for o, h in zip(own, honest, strict=True))
    for label, error, limit in zip(labels, own, allowed, strict=True):
        if not error <= limit:
            return Verdict(max(own), times, f"{label} errs by {error:.1e}, allowed are {limit:.1e}")
    return Verdict(max(own), times)
