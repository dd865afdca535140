"""How long passes take: in turns, by CUDA events on a GPU and by the clock elsewhere."""

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.gpu.contest import Numerics

Run = tuple[Callable[[], object], Numerics]


@dataclass(frozen=True)
class Pace:
    """How much time is spent.

    Attributes:
        turns: The most turns of a contestant.
        limit: Seconds for its turns; whoever has used them up sits out the rest, after three of them.
        block: Milliseconds that a turn takes at least.
        check: Seconds in which a contestant is to be made, compiled where it wasn't prepared, and checked.
    """

    turns: int = 20
    limit: float = 1.5
    block: float = 10.0
    check: float = 45.0


class TooSlowError(Exception):
    """Something took longer than it was given."""


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raise `TooSlowError` where this lasts longer; off the main thread nothing can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TooSlowError(f"{what} took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Run, repeats: int, device: torch.device) -> float:
    """Return a run's time in ms, of so many one after the other."""
    function, numerics = run
    with numerics.in_force():
        if device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            return (time.perf_counter() - start) * 1000 / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / repeats


def take_turns(runs: Mapping[str, Run], device: torch.device, pace: Pace) -> dict[str, list[float] | str]:
    """Time all runs, which have run before, turn after turn; return each one's ms a run in each turn, or why it failed."""
    times: dict[str, list[float] | str] = {}
    repeats: dict[str, int] = {}
    gc.collect()
    gc.disable()  # a collection would land in somebody's turn
    try:
        for name, run in runs.items():
            times[name] = []
            repeats[name] = max(1, min(100, math.ceil(pace.block / max(_guarded(times, name, run, 1, device), 1e-3))))
        for turn in range(pace.turns):
            for name, run in runs.items():
                taken = times[name]
                if isinstance(taken, str) or (turn >= 3 and sum(taken) * repeats[name] > pace.limit * 1000):
                    continue
                value = _guarded(times, name, run, repeats[name], device)
                if not isinstance(times[name], str):
                    taken.append(value)
    finally:
        gc.enable()
    return times


def _guarded(times: dict[str, list[float] | str], name: str, run: Run, repeats: int, device: torch.device) -> float:
    """Return a turn's time; where it fails, note the reason in place of times."""
    try:
        return milliseconds(run, repeats, device)
    except Exception as error:  # anybody's, of any kind
        times[name] = reason(error)
        return math.inf


def reason(error: BaseException) -> str:
    """Say in one line what an exception said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
