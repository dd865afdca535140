"""The loss along training, as a picture."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throughtime.errors import InputError
from throughtime.training.files import write_atomically

if TYPE_CHECKING:
    from throughtime.lm.run import Run


def plot_losses(runs: Sequence["Run"], out: Path | None = None) -> Path:
    """Draw the running loss of runs over their training time; return where the picture is.

    Held-out losses are dotted lines where they were measured along the way, and a dot at the end; rollbacks are crosses. The
    scale is nats per token.

    Args:
        runs: One or more.
        out: The file, whose suffix says its kind; `loss.png` in the first run's folder if not given.

    Raises:
        InputError: A run has no metrics yet, matplotlib isn't there, or the file can't be written.
    """
    curves = [_curve(run) for run in runs]
    figure, axes = _figure()
    for run, curve in zip(runs, curves, strict=True):
        seconds = [point["seconds"] for point in curve]
        (line,) = axes.plot(seconds, [point["loss"] for point in curve], label=run.folder.name)
        measured = [point for point in run.metrics() if point.get("event") == "validation"]
        if measured:
            losses = [point["loss"] for point in measured]
            axes.plot([point["seconds"] for point in measured], losses, ":", color=line.get_color(), label="measured")
        if run.results is not None:
            held_out = run.results["held_out"]["nats_per_token"]
            axes.plot(seconds[-1:], [held_out], "o", color=line.get_color(), label=f"held out: {held_out:.3f}")
        at = [point["step"] for point in run.metrics() if point.get("event") == "rollback"]
        crossed = [min(curve, key=lambda point, step=step: abs(point["step"] - step)) for step in at]
        axes.plot([p["seconds"] for p in crossed], [p["loss"] for p in crossed], "x", color=line.get_color())
    axes.legend()
    if out is None:
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120)
        write_atomically(out := runs[0].folder / "loss.png", picture.getvalue())
        return out
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: can't be drawn there: {getattr(error, 'strerror', None) or error}") from error
    return out


def _curve(run: "Run") -> list[dict[str, Any]]:
    """Return a run's metrics along its steps; of steps that were taken anew, after a crash or a rollback, the last time."""
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
    return curve


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("'throughtime plot' needs matplotlib: pip install 'throughtime[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    return figure, axes
