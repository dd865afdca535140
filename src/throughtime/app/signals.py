"""Ctrl-C, SIGTERM and SIGHUP, however often they come: one of them ends the program, and the others wait for that."""

import signal
import sys
import threading
from typing import Any

LATE = 10.0  # seconds after a training was asked to stop, in which nothing is left but to say so


_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def end_once() -> None:
    """Have one Ctrl-C interrupt the program, and no signal disturb what a training that was stopped still has to say.

    While a training runs it takes note of signals itself; a signal that is ignored, as under nohup, stays so.
    """
    for number in _settable():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def ignore() -> None:
    """Let no signal disturb the end of the process, whose exit code is known."""
    # Python ends `python -m` by a SIGINT of its own where one came through the exec of a text, as dataclasses and torch use it,
    # and was caught; the next text makes it forget that.
    exec("")
    for number in _settable():
        signal.signal(number, signal.SIG_IGN)


def _settable() -> list[int]:
    return _NUMBERS if threading.current_thread() is threading.main_thread() else []


def _end(number: int, frame: Any) -> None:
    loop = sys.modules.get("throughtime.training.loop")
    if loop is not None and loop.seconds_since_interrupt() < LATE:
        return
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
