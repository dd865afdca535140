"""Is the answer right, and how long does it take: contestants in turns, medians over the turns."""

import math
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.speed.case import HONEST, Contest, Contestant, Results

SETTLE = 0.01  # seconds before a turn, in which the last one's waiting threads stop spinning
WORST = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative error from which a peer computes something else
WORST_HONEST = 1e-2  # relative error from which rounding has eaten an answer, and nobody can be judged


class WrongAnswerError(Exception):
    """A contestant's answer is not the case's."""


def check(contest: Contest, exact: Results) -> None:
    """Refuse wrong answers: those on trial may err 3 times what their judge errs, all against float64.

    The judge's error is floored at two units in the last place of the largest exact value, so that a judge who happens to
    err by nothing does not forbid rounding; of several honest answers the least accurate judges.
    """
    judges = {one.name: [one.read(one.run())] for one in contest.contestants}
    judges[HONEST] = [run() for run in contest.honest]
    on_trial = [(one, judges[one.name][0]) for one in contest.contestants]
    on_trial += [(Contestant(HONEST, run), answer) for run, answer in zip(contest.honest, judges[HONEST], strict=True)]
    for one, answer in sorted(on_trial, key=lambda pair: pair[0].judged_by is not None):  # first those who judge
        rights = one.exact() if one.exact else exact
        peers = judges[one.judged_by or one.name]
        for index, (given, right) in enumerate(zip(answer, rights, strict=True)):
            if given.shape != right.shape:
                raise WrongAnswerError(f"{one.name}: result {index} is {tuple(given.shape)}, not {tuple(right.shape)}")
            scale = float(right.abs().max())
            allowed = scale * (WORST[torch.bfloat16] if "bf16" in one.name else WORST[torch.float32])
            if one.name == HONEST:
                allowed = scale * WORST_HONEST
            if one.judged_by:
                floor = 2 * torch.finfo(given.dtype).eps * scale
                allowed = 3 * max(floor, *(_error(peer[index], right) for peer in peers))
            if not _error(given, right) <= allowed:
                error = f"{_error(given, right):.2e}, allowed are {allowed:.2e}"
                raise WrongAnswerError(f"{one.name}: result {index} errs by {error}")


def _error(given: torch.Tensor, right: torch.Tensor) -> float:
    return float((given.double() - right).abs().max())


def take_turns(
    contestants: Sequence[Contestant], budget: float, most: int = 25, block: float = 0.02
) -> dict[str, list[float]]:
    """Time all contestants turn after turn; return each one's seconds a run, one entry a turn.

    Args:
        contestants: Who; each has run before.
        budget: Seconds for all of them together; three turns are the least.
        most: The most turns.
        block: Seconds that one contestant's turn takes at least.
    """
    repeats = {}
    for one in contestants:
        with one.around():
            once = _seconds_a_run(one, 1)
        repeats[one.name] = max(1, math.ceil(block / once))
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    began = time.perf_counter()
    for turn in range(most):
        if turn >= 3 and (time.perf_counter() - began) * (turn + 1) / turn > budget:
            break
        for one in contestants:
            with one.around():
                time.sleep(SETTLE)
                seconds[one.name].append(_seconds_a_run(one, repeats[one.name]))
    return seconds


def _seconds_a_run(one: Contestant, repeats: int) -> float:
    """By the clock; with one thread by the processor's time, which other processes disturb less."""
    now = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    start = now()
    for _ in range(repeats):
        one.run()
    return (now() - start) / repeats


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper one."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
