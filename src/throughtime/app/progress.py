"""Training as it is seen: one live line on a terminal, a few plain lines elsewhere. All of it goes to stderr."""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from throughtime.app.reports import headline
from throughtime.app.terminal import duration, messages
from throughtime.plain import printable

if TYPE_CHECKING:
    from throughtime.lm.training import ShortText, StepReport
    from throughtime.training import Rollback, Validation

REFRESH = 0.2  # seconds between two drawings of the live line
LINES = 10  # plain lines in a whole training, where there is no terminal
LONGEST_SILENCE = 60.0  # seconds between two plain lines, at most
_ROOMY = 100  # columns from which units are written out


class Display(Protocol):
    """Something that shows training: a context that takes step reports."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, report: "StepReport") -> None:
        """Take what one step reports."""
        ...

    def reading(self, done: int, total: int) -> None:
        """Take how many bytes of the text are read."""
        ...

    def say(self, line: str) -> None:
        """Print a line of its own."""
        ...


def display(unit: str, *, passing: bool = False) -> Display:
    """Return the display that suits stderr.

    Args:
        unit: What a token is: "char", "byte", "word" or "bpe".
        passing: Whether it is one training of many, of which no more is to stay than what is said.
    """
    unit = "token" if unit == "bpe" else unit
    console = messages()
    is_live = console.is_terminal and not console.is_dumb_terminal
    return LiveLine(unit, passing) if is_live else PlainLines(unit, 0 if passing else LINES)


def observed(shown: Display, run: Path, reason: str | None = None) -> Callable[["StepReport"], None]:
    """Return an observer for training that says what is trained, on what, and why that, before it shows the first step."""
    said = False

    def observe(report: "StepReport") -> None:
        nonlocal said
        if not said:
            shown.say(headline(open_run(run)))
            if reason is not None:
                shown.say(reason)
            said = True
        shown(report)

    from throughtime.lm.run import open_run

    return observe


def said(shown: Display) -> Callable[["Rollback | Validation | ShortText"], None]:
    """Return what says that training was measured, went back after a divergence, or chose a window for a short text."""
    from throughtime.lm.training import ShortText
    from throughtime.training import Rollback

    def say(event: "Rollback | Validation | ShortText") -> None:
        if isinstance(event, ShortText):
            batch, bptt = event.window
            shown.say(f"the text is short, {event.tokens:,} tokens to train on: chosen --batch {batch}  --bptt {bptt}")
        elif isinstance(event, Rollback):
            what = event.reason.partition(";")[0]
            shown.say(f"{what}: back to step {event.to_step:,}, learning rate down to {event.learning_rate:.3g}")
        else:
            shown.say(f"step {event.step:,}: {event.loss:.4f} on held-out text" + (", the best so far" * event.is_best))

    return say


def probe_gradients(*window: Any) -> dict[str, float | None]:
    """Measure how far the gradients of a window of training reach; the arguments are those of `insight.track_gradients`."""
    from throughtime.insight.tracking import track_gradients

    return track_gradients(*window)._asdict()


class LiveLine:
    """A progress bar with the loss, bits per character, tokens per second, gradient norm and time left."""

    def __init__(self, unit: str, passing: bool = False) -> None:
        self._progress = Progress(
            BarColumn(
                bar_width=None,
                complete_style="cyan",
                finished_style="cyan",
                table_column=Column(ratio=1, min_width=4),
            ),
            _Figures(unit),
            console=messages(),
            expand=True,
            auto_refresh=False,
            transient=passing,
        )
        self._task = self._progress.add_task("training", total=1.0, report=None, reading=None, ending="measuring")
        self._drawn = 0.0

    def reading(self, done: int, total: int) -> None:
        """Draw how much of the text is read."""
        if self._is_due() or done == total:
            self._draw(completed=done / max(total, 1), reading=(done, total))

    def say(self, line: str) -> None:
        """Print a line above the bar; a long one is broken between words."""
        self._progress.console.print(Text(printable(line, keep="\n")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._progress.update(self._task, ending="done", refresh=True)
        elif self._progress.tasks[0].fields["report"] is None:
            self._progress.live.transient = True  # a mistake found before the first step leaves its one line alone
        self._progress.stop()

    def __call__(self, report: "StepReport") -> None:
        """Draw the line anew, unless it was drawn just now."""
        if self._is_due() or report.progress >= 1:
            self._draw(completed=report.progress, report=report)

    def _draw(self, **fields: Any) -> None:
        self._progress.start()  # not before there is something to show; a second start does nothing
        self._progress.update(self._task, refresh=True, **fields)

    def _is_due(self) -> bool:
        now = time.monotonic()
        due = now - self._drawn >= REFRESH
        if due:
            self._drawn = now
        return due


class PlainLines:
    """A line at every tenth of the training, and at least every minute: for logs and pipes."""

    def __init__(self, unit: str, lines: int = LINES) -> None:
        self._unit = unit
        self._lines = lines
        self._console = messages()
        self._tenths = 0
        self._printed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def reading(self, done: int, total: int) -> None:
        """Print a line while a large text is read, if one is due."""
        now = time.monotonic()
        if now - self._printed >= LONGEST_SILENCE:
            self._printed = now
            self.say(_megabytes(done, total))

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(Text(printable(line, keep="\n")), soft_wrap=True)

    def __call__(self, report: "StepReport") -> None:
        """Print a line if one is due."""
        now, tenths = time.monotonic(), int(report.progress * self._lines)
        if tenths > self._tenths or now - self._printed >= LONGEST_SILENCE:
            self._tenths, self._printed = tenths, now
            self._console.print(
                Text(f"{report.progress:4.0%}  step {report.step:,}  ") + figures(report, self._unit, roomy=True),
                soft_wrap=True,
            )


class _Figures(ProgressColumn):
    """The numbers to the right of the bar."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        """Return the numbers of the last report, or say that there is none yet."""
        report: StepReport | None = task.fields["report"]
        if report is None:
            return Text(_megabytes(*task.fields["reading"]) if task.fields["reading"] else "starting", "dim")
        roomy = messages().width >= _ROOMY
        shown = figures(report, self._unit, roomy=roomy, ending=task.fields["ending"])
        return (
            Text(f"{report.progress:4.0%}  ") + shown + "   "
        )  # room for the terminal's ^C, which would break the line


def figures(report: "StepReport", unit: str, *, roomy: bool, ending: str = "measuring") -> Text:
    """Return a report's numbers in one line, with units written out where there is room; `ending` stands there at the end."""
    speed = f"{report.tokens_per_second:,.0f}" if roomy else _short(report.tokens_per_second)
    norm = f"{report.gradient_norm:.2f}"
    parts = [
        ("loss ", f"{report.loss:.3f}", ""),
        ("", f"{report.bits_per_character:.2f}", " bits/char" if roomy else " bpc"),
        ("", speed, f" {unit}s/s" if roomy else f" {unit}/s"),
        ("gradient norm " if roomy else "‖g‖ ", norm, ""),
        _time_left(report, ending),
    ]
    text = Text()
    for label, value, after in parts:
        text.append("  " if text else "").append(label, "dim").append(value).append(after, "dim")
    return text


def _time_left(report: "StepReport", ending: str) -> tuple[str, str, str]:
    if report.progress >= 1:
        return "", ending, ""
    return "", "–:––" if report.seconds_left is None else duration(report.seconds_left), " left"


def _megabytes(done: int, total: int) -> str:
    return f"reading text, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"


def _short(count: float) -> str:
    """Return a count in at most five places: 950, 41.2k, 1.3M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"
