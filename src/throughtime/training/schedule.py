"""How long to train, and how fast to learn along the way."""

import math
from dataclasses import dataclass

from throughtime.errors import FieldError, InputError, unknown_name

SHAPES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """The factor on the peak learning rate along training: a linear rise, a way down, and a decay by epochs.

    Attributes:
        shape: The way down: "cosine" is half a cosine (Loshchilov & Hutter, 2017), "linear" a straight line, "constant" none.
        warmup: Share of the training that the rise takes, from 0 to below 1.
        final: Factor at the end of a cosine or a line.
        decay: Factor for each epoch begun after the first `decay_after`; 1 is none (Zaremba et al., 2014).
        decay_after: Epochs at the full rate.

    Raises:
        InputError: There is no such shape, or a share or a factor is out of range.

    Example:
        >>> [round(Schedule(warmup=0.1, final=0.0).factor(p), 2) for p in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
        >>> zaremba_small = Schedule("constant", warmup=0.0, decay=0.5, decay_after=4)
        >>> [zaremba_small.factor(epoch / 13, epoch) for epoch in (0, 3.9, 4, 5.5)]
        [1.0, 1.0, 0.5, 0.25]
    """

    shape: str = "cosine"
    warmup: float = 0.02
    final: float = 0.02
    decay: float = 1.0
    decay_after: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise unknown_name("schedule", self.shape, SHAPES)
        for field, share in (("warmup", self.warmup), ("final", self.final)):
            if not 0 <= share < 1:
                raise FieldError(field, share, "a share from 0 to below 1")
        if not 0 < self.decay <= 1:
            raise FieldError("decay", self.decay, "a factor above 0, at most 1")
        if not 0 <= self.decay_after < math.inf:
            raise FieldError("decay_after", self.decay_after, "a number of epochs, 0 or more")

    def factor(self, progress: float, epoch: float = 0.0) -> float:
        """Return the factor.

        Args:
            progress: Share of the training done, 0 … 1.
            epoch: Passes over the data so far.
        """
        decayed = self.decay ** max(math.floor(epoch) + 1 - self.decay_after, 0)
        if progress < self.warmup:
            return decayed * progress / self.warmup
        along = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        down = {"cosine": (1 + math.cos(math.pi * along)) / 2, "linear": 1 - along, "constant": 1.0}[self.shape]
        return decayed * (self.final + (1 - self.final) * down)


_MOST = 1e12  # minutes, epochs or steps: beyond all patience, and within what is counted exactly


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
            names = " and ".join(given) or "none"
            raise InputError(f"a budget of {names}: expected exactly one of minutes, epochs and steps")
        for name, value in given.items():
            if not 0 < value <= _MOST:
                raise FieldError(name, value, "a number above 0, at most 1e12")

    def describe(self) -> str:
        """Return the budget in words.

        Example:
            >>> Budget(minutes=5).describe(), Budget(steps=1).describe()
            ('5 minutes', '1 step')
        """
        (name, value), *_ = ((name, value) for name, value in vars(self).items() if value is not None)
        return f"{value:,.10g} {name if value != 1 else name.removesuffix('s')}"

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
