"""What a lag curve comes to, in words: vanishing, exploding or healthy within the steps that are needed, or not to be told."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from throughtime.insight.gradient_flow import Horizon

EXPLODED, VANISHED = 10.0, 1e-3  # shares of a loss's gradient
NEEDED = 200  # steps that gradients are wanted to reach, where nothing says how many


class Need(NamedTuple):
    """Over how many steps gradients have to reach.

    Attributes:
        steps: N.
        reason: What number that is, such as "its --bptt"; empty where it is nobody's.
    """

    steps: int = NEEDED
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.reason} of {self.steps}" if self.reason else f"{self.steps} steps"


class Overflow(NamedTuple):
    """Where a float type couldn't hold the states.

    Attributes:
        dtype: "float32" or "float64".
        step: The first step at which a state isn't finite.
    """

    dtype: str
    step: int


class Verdict(NamedTuple):
    """What it comes to: "vanishing", "exploding", "healthy" or "undecided", and a sentence that says so with figures."""

    kind: str
    sentence: str


def judge(
    curve: Sequence[float],
    reach: Horizon,
    need: Need = Need(),  # noqa: B008
    overflow: Overflow | None = None,
    between: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Verdict:
    """Say in words what a lag curve comes to over the steps that are needed, however many more it has.

    Exploding: within them it is ten times its start or more, or the states grow past what a float holds. Vanishing:
    within them it falls below a thousandth of its start. Healthy: neither.
    Undecided: the curve is shorter than what is needed, or its confidence interval has room for two of these.

    Args:
        curve: φ_k / φ_0; NaN where no loss reaches back so far.
        reach: K_ε at ε = 1/1000.
        need: Over how many steps.
        overflow: Where the states overflow, if they do.
        between: The ends of the curve's confidence interval, NaN where there is none.

    Example:
        >>> judge([0.9**k for k in range(11)], Horizon(0.001, math.inf, math.inf, math.inf), Need(10)).sentence
        "healthy within 10 steps: 0.39 of a loss's gradient is left at lag 9"
    """
    told = _told(curve)
    within = told[: need.steps]
    largest = max(within, default=0.0)
    grown = _grown(within)
    if overflow is not None:
        rest = f"; {grown}" if largest > 1 else ""
        return Verdict(
            "exploding", f"exploding: states are too large for {overflow.dtype} from step {overflow.step} on{rest}"
        )
    if not told or math.isnan(curve[0]):
        return Verdict("vanishing", "vanishing: the losses send no gradient into the layer")
    if largest > 1 and between is not None:
        low, high = (edge[within.index(largest)] for edge in between)
        if low < EXPLODED <= high:
            return Verdict("undecided", f"undecided within {need}: {grown}, between ×{low:.2g} and ×{high:.2g}")
    if largest >= EXPLODED:
        return Verdict("exploding", f"exploding within {need}: {grown}")
    if reach.low < need.steps <= reach.high:
        at = "past them" if reach.lag >= len(told) else f"at lag {reach.lag:.0f}"
        return Verdict("undecided", f"undecided within {need}: 1/1000 is left {at}{interval(reach)}")
    if reach.lag < need.steps:
        beyond = f"beyond lag {reach.lag:.0f}{interval(reach)}"
        return Verdict("vanishing", f"vanishing within {need}: less than 1/1000 is left {beyond}")
    last = len(within) - 1
    if len(told) < need.steps:
        left = f"{within[-1]:.2g} is left at lag {last}"
        return Verdict("undecided", f"undecided within {need}: {len(told)} lags are too few to tell; {left}")
    left = f"{within[-1]:.2g} of a loss's gradient is left at lag {last}"
    return Verdict("healthy", f"healthy within {need}: {left}{_beyond(told, reach)}")


def interval(reach: Horizon) -> str:
    """Return a horizon's confidence interval as it is printed, after a space: " [31–37]"; nothing where there is one row only."""
    if math.isnan(reach.low):
        return ""
    low, high = ("beyond" if edge == math.inf else f"{edge:.0f}" for edge in (reach.low, reach.high))
    return f" [{low}–{high}]"


def _told(curve: Sequence[float]) -> list[float]:
    """Return the curve up to where losses reach back."""
    end = next((k for k, value in enumerate(curve) if math.isnan(value)), len(curve))
    return list(curve[:end])


def _grown(curve: Sequence[float]) -> str:
    """Say how much a curve has grown at most, as far as it is finite."""
    largest = max((value for value in curve if value < math.inf), default=0.0)
    further = ", and on" if math.inf in curve else ""
    return f"a loss's gradient has grown ×{largest:.3g} at lag {list(curve).index(largest) if largest else 0}{further}"


def _beyond(told: Sequence[float], reach: Horizon) -> str:
    """Say what comes after the steps that are needed, if the curve tells."""
    if reach.lag < math.inf:
        return f"; 1/1000 at lag {reach.lag:.0f}{interval(reach)}"
    return f"; after them {_grown(told)}" if max(told) >= EXPLODED else ""
