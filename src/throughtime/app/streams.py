"""Standard output and error where they are closed, full, or gone: messages are lost, nothing else is, and nothing crashes."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from throughtime.errors import InputError


def prepare() -> None:
    """Make standard output and error safe to use, whatever the shell did to them.

    A letter that the terminal's encoding lacks is shown as another; where messages can't be written they are lost.

    Raises:
        InputError: Standard output is closed.
    """
    with contextlib.suppress(OSError):  # or the next file that is opened becomes standard output
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 open to the end
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not isinstance(sys.stderr, _Messages):
        sys.stderr = _Messages(sys.stderr)  # type: ignore[assignment]
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        raise InputError("standard output is closed; expected a terminal, a file or a pipe, such as >/dev/null")


def discard(stream: TextIO) -> None:
    """Throw away what a stream still holds and whatever comes, so that Python's own last flush doesn't fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def mute() -> None:
    """Show nothing on standard output and error until the end, or `unmute`."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 open to the end
    _before_mute[:] = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = nowhere


def unmute() -> None:
    """Show again what is printed from now on."""
    if _before_mute:
        sys.stdout, sys.stderr = _before_mute
        _before_mute.clear()


_before_mute: list[TextIO] = []


class _Messages:
    """Standard error that never fails: what can't be written, on a full disk or a terminal that is gone, is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(ValueError):
            try:
                self._stream.write(text)
                self._stream.flush()
            except OSError:
                discard(self._stream)
        return len(text)

    def flush(self) -> None:
        self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
