"""What is printed: results go to stdout, everything said along the way goes to stderr, and nothing foreign commands a terminal."""

import codecs
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from throughtime.plain import escape, printable, to_json

SILENCE = 10.0  # seconds between two lines about what is under way, where there is no terminal
Show = Callable[[str], None]


class _SafeConsole(Console):
    """A console on which nothing but its own control codes commands the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments of what is printed, escapes in place of what isn't printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))


def results() -> Console:
    """Return the console on stdout. Text is printed as it is: no markup, no emoji codes, no guessed highlighting."""
    return _SafeConsole(file=sys.stdout, markup=False, emoji=False, highlight=False)


def messages() -> Console:
    """Return the console on stderr, for progress and notes."""
    return _SafeConsole(file=sys.stderr, markup=False, emoji=False, highlight=False)


def note(line: str, style: str = "") -> None:
    """Print one line on stderr, whatever is in it."""
    messages().print(Text(printable(line), style), soft_wrap=True)


@contextlib.contextmanager
def under_way(line: str, first: float | None = None) -> Iterator[Show]:
    """Show a line on stderr while something long is under way; it can be exchanged, at once on a terminal, else now and then.

    Args:
        line: What is shown first.
        first: Seconds after which the latest line is printed where there is no terminal; `None` waits for one that is due.
    """
    console = messages()
    if console.is_terminal and not console.is_dumb_terminal:
        with console.status(Text(printable(line))) as status:
            yield lambda line: status.update(Text(printable(line)))
        return
    told, latest = time.monotonic(), line

    def tell(line: str) -> None:
        nonlocal told, latest
        latest = line
        if time.monotonic() - told >= SILENCE:
            told = time.monotonic()
            note(line)

    timer = None if first is None else threading.Timer(first, lambda: note(latest))
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield tell
    finally:
        if timer is not None:
            timer.cancel()


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object on stdout, in a line."""
    print(to_json(record), flush=True)


def write(text: str) -> None:
    """Write a model's or a file's own text to stdout at once: as it is, but where a terminal could be commanded by it."""
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Output:
    """Text and bytes on their way to stdout, at once.

    Bytes are written as they are; a terminal gets them as the UTF-8 that they are, and what is none by its escapes.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._at_line_end = False

    def write(self, piece: str | bytes) -> None:
        """Write text, or bytes."""
        self._at_line_end = piece[-1:] in ("\n", b"\n") if piece else self._at_line_end
        if isinstance(piece, bytes) and not sys.stdout.isatty():
            sys.stdout.flush()
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        else:
            write(self._decoder.decode(piece) if isinstance(piece, bytes) else piece)

    def write_all(self, pieces: Iterable[str] | Iterable[bytes]) -> None:
        """Write pieces as they come, to the last byte of the last character."""
        for piece in pieces:
            self.write(piece)
        write(self._decoder.decode(b"", final=True))

    def end_line(self) -> None:
        """Write a line end, unless the last piece did."""
        if not self._at_line_end:
            self.write("\n")


def visible(text: str) -> str:
    r"""Return text in which every character is seen: a space as ␣, a line end as ↵, anything unprintable by its escape.

    Example:
        >>> visible("a b\n")
        'a␣b↵'
    """
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else escape(c)) for c in text)


def number(value: float, digits: int = 3) -> str:
    """Return a number with a fixed count of digits and a true minus sign; what rounds to zero has no sign.

    Example:
        >>> number(-0.12345), number(-0.00001)
        ('−0.123', '0.000')
    """
    shown = f"{value:.{digits}f}"
    if shown.startswith("-"):
        shown = shown[1:] if float(shown) == 0 else "−" + shown[1:]
    return shown


_VISIBLE = {" ": "␣", "\n": "↵", "\r": "↤", "\t": "⇥"}


def duration(seconds: float) -> str:
    """Return a time as a clock shows it.

    Example:
        >>> duration(61), duration(3700)
        ('1:01', '1:01:40')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
