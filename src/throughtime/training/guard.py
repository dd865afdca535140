"""What ends a training before it ends the weights: a loss or a gradient that is no number, or a loss that has jumped up."""

import math
from dataclasses import dataclass

from throughtime.errors import InputError

_SETTLED = 50  # steps after which a running mean says something
_FAST, _SLOW = 0.8, 0.98  # weight of the past in the two running means


class NonFiniteError(InputError):
    """The loss or the gradient became NaN or infinite; the last checkpoint before that is kept."""


class DivergedError(NonFiniteError):
    """The loss jumped up, or rose, far beyond what it was; the last checkpoint before that is kept."""


def check_finite(loss: float, gradient_norm: float, step: int) -> None:
    """Raise unless both numbers are finite.

    Raises:
        NonFiniteError: With the step, and which of the two it was.
    """
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {name} became {value} at step {step}; the last good checkpoint is kept. "
                "Lower the learning rate, or clip gradients (to a norm of 1, for example)"
            )


@dataclass
class LossWatch:
    """Running means of the loss, and what of them is a divergence.

    Once 50 steps are done, the loss has diverged where the mean of the last few is above twice the mean of the last hundred plus
    1, or where the latter is above 1.5 times the lowest that it has been plus 0.5. A text that changes its subject does neither.

    Attributes:
        slow: Mean over about the last 50 steps.
        fast: Mean over about the last 5.
        lowest: The least that `slow` has been since it settled.
        steps: How many losses were seen.
    """

    slow: float = 0.0
    fast: float = 0.0
    lowest: float = math.inf
    steps: int = 0

    def see(self, loss: float) -> None:
        """Take the next loss in."""
        self.slow = loss if not self.steps else _SLOW * self.slow + (1 - _SLOW) * loss
        self.fast = loss if not self.steps else _FAST * self.fast + (1 - _FAST) * loss
        self.steps += 1
        if self.steps >= _SETTLED:
            self.lowest = min(self.lowest, self.slow)

    def check(self, loss: float, step: int) -> None:
        """Raise if the next loss would be a divergence.

        Raises:
            DivergedError: With the step, and what the loss was before.
        """
        if self.steps < _SETTLED:
            return
        fast = _FAST * self.fast + (1 - _FAST) * loss
        slow = _SLOW * self.slow + (1 - _SLOW) * loss
        if fast > 2 * self.slow + 1 or slow > 1.5 * self.lowest + 0.5:
            raise DivergedError(
                f"the loss went up to {loss:.3g} at step {step}, from {self.lowest:.3g}; the last good checkpoint is kept. "
                "Lower the learning rate, or clip gradients (to a norm of 1, for example)"
            )
