"""How long to train, and how fast to learn along the way."""

import math
from dataclasses import dataclass

from throughtime.errors import InputError


def warmup_cosine(progress: float, warmup: float = 0.02, final: float = 0.02) -> float:
    """Return the factor on the peak learning rate: a linear rise, then half a cosine down (Loshchilov & Hutter, 2017).

    Args:
        progress: Share of the training done, 0 … 1.
        warmup: Share of the training that the rise takes, 0 … 1.
        final: Factor at the end.

    Example:
        >>> [round(warmup_cosine(p, warmup=0.1, final=0.0), 2) for p in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    along = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return final + (1 - final) * (1 + math.cos(math.pi * min(along, 1.0))) / 2


@dataclass(frozen=True)
class Budget:
    """How long to train: exactly one of three.

    Attributes:
        minutes: Training time; evaluation and saving don't count.
        epochs: Passes over the data; fractions are allowed.
        steps: Updates.

    Raises:
        InputError: None or several are given, or one is not above 0.
    """

    minutes: float | None = None
    epochs: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            names = " and ".join(f"--{name}" for name in given) or "none"
            raise InputError(f"a budget of {names}: expected exactly one of --minutes, --epochs, --steps")
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise InputError(f"--{name} {value}: expected a number above 0")

    def progress(self, seconds: float, step: int, steps_per_epoch: int) -> float:
        """Return the share of the budget that is used up, 1 or more when it is spent."""
        if self.minutes is not None:
            return seconds / (60 * self.minutes)
        return step / self.total_steps(steps_per_epoch)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return how many steps a budget of steps or epochs holds, at least 1."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(round(self.epochs * steps_per_epoch), 1)
