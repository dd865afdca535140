"""A loss or a gradient that is no number ends training, before it ends the weights."""

import math

from throughtime.errors import InputError


class NonFiniteError(InputError):
    """The loss or the gradient became NaN or infinite; the last checkpoint before that is kept."""


def check_finite(loss: float, gradient_norm: float, step: int) -> None:
    """Raise unless both numbers are finite.

    Raises:
        NonFiniteError: With the step, and which of the two it was.
    """
    for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {name} became {value} at step {step}; the last good checkpoint is kept. "
                "Lower --lr, or set --clip (for example --clip 1)"
            )
