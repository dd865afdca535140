"""The loss along training, as a picture."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from throughtime.errors import InputError
from throughtime.plain import escape, printable
from throughtime.training.files import write_atomically

if TYPE_CHECKING:
    from throughtime.lm.run import Run

_OWN_FONT = "DejaVu Sans"  # which matplotlib brings


class _Drawn(NamedTuple):
    """What is drawn of a run: its steps, what their losses are multiplied by, and the name of its result in the same unit."""

    run: "Run"
    curve: list[dict[str, Any]]
    scale: float
    result: str


def plot_losses(runs: Sequence["Run"], out: Path | None = None) -> Path:
    """Draw the running loss of runs over their training time; return where the picture is.

    Held-out losses are dotted lines where they were measured along the way, and a dot at the end; rollbacks are crosses. The
    scale is nats per token, or bits per character where the runs' tokens differ in kind.

    Args:
        runs: One or more.
        out: The file, whose suffix says its kind, ".png" if it has none; `loss.png` in the first run's folder if not given.

    Raises:
        InputError: A run has no metrics yet, matplotlib isn't there, or the file can't be written.
    """
    in_bits = len({run.tokenizer.level for run in runs}) > 1
    drawn = [_drawn(run, in_bits) for run in runs]
    figure, axes = _figure("bits per character" if in_bits else "nats per token")
    entries = [entry for one in drawn for entry in _draw(axes, one)]
    names, families = _drawable([name for _, name in entries])
    legend = axes.legend(
        [line for line, _ in entries], [f"{n}" for n in range(len(entries))], prop={"family": families}
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)  # a name is no formula, and one that begins with "_" is a name
        text.set_text(name)
    picture = io.BytesIO()
    if out is None:
        figure.savefig(picture, dpi=120)
        write_atomically(out := runs[0].folder / "loss.png", picture.getvalue())
        return out
    out = out if out.suffix or not out.name else out.with_name(f"{out.name}.png")
    try:
        figure.savefig(picture, dpi=120, format=out.suffix[1:] or None)
        if out.is_symlink() or (out.exists() and not out.is_file()):
            out.write_bytes(picture.getvalue())  # the user's own link or pipe
        else:
            write_atomically(out, picture.getvalue())
    except (OSError, ValueError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise InputError(f"--out {out}: can't be drawn there: {reason}") from error
    return out


def _draw(axes: Any, drawn: _Drawn) -> list[tuple[Any, str]]:
    """Draw one run; return the lines that the legend names, and their names."""
    run, curve, scale, result = drawn
    seconds = [point["seconds"] for point in curve]
    (line,) = axes.plot(seconds, [scale * point["loss"] for point in curve])
    entries = [(line, run.folder.name or run.folder.resolve().name)]
    colour, events = line.get_color(), run.metrics()
    measured = [point for point in events if point.get("event") == "validation"]
    if measured:
        losses = [scale * point["loss"] for point in measured]
        (dotted,) = axes.plot([point["seconds"] for point in measured], losses, ":", color=colour)
        entries.append((dotted, "measured"))
    if run.results is not None:
        held_out = run.results["held_out"][result]
        (dot,) = axes.plot(seconds[-1:], [held_out], "o", color=colour)
        entries.append((dot, f"held out: {held_out:.3f}"))
    at = [point["step"] for point in events if point.get("event") == "rollback"]
    crossed = [min(curve, key=lambda point, step=step: abs(point["step"] - step)) for step in at]
    axes.plot([p["seconds"] for p in crossed], [scale * p["loss"] for p in crossed], "x", color=colour)
    return entries


def _drawn(run: "Run", in_bits: bool) -> _Drawn:
    """Take a run's metrics along its steps; of steps that were taken anew, after a crash or a rollback, the last time."""
    curve: list[dict[str, Any]] = []
    for point in run.metrics():
        if "event" in point or not math.isfinite(point["loss"]):
            continue
        while curve and curve[-1]["step"] >= point["step"]:
            curve.pop()
        curve.append(point)
    if not curve:
        if run.config.packed is not None:
            raise InputError(
                f"{run.folder}: was packed to be shared, without the curve of its loss; plot the run itself"
            )
        raise InputError(f"{run.folder}: no metrics yet; train first")
    if not in_bits:
        return _Drawn(run, curve, 1.0, "nats_per_token")
    told = next((point for point in curve if point["loss"] > 0), None)
    return _Drawn(run, curve, told["bits_per_character"] / told["loss"] if told else 1.0, "bits_per_character")


def _drawable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names as the fonts that are here can draw them, and these fonts; a letter that none has is its escape."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    names = [printable(name) for name in names]
    families, missing = [_OWN_FONT], _without(get_font(findfont(_OWN_FONT)), "".join(names))
    for font in fontManager.ttflist if missing else []:
        found = missing - _without(get_font(font.fname), missing)
        if found:
            families.append(font.name)
            missing -= found
        if not missing:
            break
    return ["".join(escape(c) if c in missing else c for c in name) for name in names], families


def _without(font: Any, characters: Iterable[str]) -> set[str]:
    return {character for character in characters if not font.get_char_index(ord(character))}


def _figure(unit: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("'throughtime plot' needs matplotlib: pip install 'throughtime[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    return figure, axes
