"""`throughtime compare-gradients`: several cells or runs, measured the same way, in one table and one picture."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from throughtime.app.gradients import Subject, find_subject, measure_subject, overlay, seeds_told, trained_window
from throughtime.app.terminal import number
from throughtime.errors import InputError
from throughtime.plain import printable, to_json

if TYPE_CHECKING:
    from throughtime.insight.gradient_flow import Horizon
    from throughtime.insight.report import GradientReport

MARKS = "abcdefghijklmnopqrstuvwxyz"
NAME = "compare-gradients"


def read_subjects(names: Sequence[str], **options: Any) -> dict[str, Subject]:
    """Return what names stand for: the folder of a run, or a cell, as in `lstm` or `lstm@forget:3`.

    Args:
        names: Two or more, each different.
        options: As in `Subject`; `hidden` and `layers` are for the cells among them.

    Raises:
        InputError: There are too few or too many, or one twice, or a size is given and all are runs.
    """
    if not 2 <= len(names) <= len(MARKS):
        raise InputError(
            f"{len(names)} given; expected from 2 to {len(MARKS)} runs or cells, such as: lstm lstm@forget:3"
        )
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InputError(f"{twice} is given twice; expected different runs or cells")
    sizes = {flag: options.pop(flag) for flag in ("hidden", "layers")}
    are_runs = [Path(name).is_dir() for name in names]
    for flag, value in sizes.items():
        if value is not None and all(are_runs):
            raise InputError(f"--{flag} {value}: a run has its own; expected it with a cell among them")
    if options["lags"] is None:
        options["lags"] = _enough(
            [Path(name) for name, is_run in zip(names, are_runs, strict=True) if is_run], options["within"]
        )
    subjects = {}
    for name, is_run in zip(names, are_runs, strict=True):
        if is_run:
            subjects[name] = Subject(run=Path(name), **options)
            continue
        cell, _, init = name.partition("@")
        subjects[name] = Subject(cell=cell, init=init or None, **sizes, **options)
    return subjects


def _enough(runs: Sequence[Path], within: int | None) -> int:
    """Return over how many lags to follow losses: the same for all, and enough for each."""
    from throughtime.insight.report import LAGS

    return max([LAGS, *(trained_window(run) for run in runs)]) if within is None else max(LAGS, within)


def compare(subjects: dict[str, Subject]) -> "dict[str, GradientReport]":
    """Measure every subject."""
    found, reports = {}, {}
    for name, subject in subjects.items():  # before anything is measured, so that a mistake is told at once
        with _named(name):
            found[name] = find_subject(subject)
    for name, subject in subjects.items():
        with _named(name):
            reports[name] = measure_subject(subject, found[name], with_trials=False).report
    return reports


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which subject a mistake is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def print_comparison(reports: "dict[str, GradientReport]", console: Console) -> None:
    """Print the curves over each other, and a row of figures for each."""
    first = next(iter(reports.values()))
    console.print(Text(f"gradient left of a loss at lag k, top layer, over {first.lags} lags", "bold"))
    curves = [(mark, report.top.curve) for mark, report in zip(MARKS, reports.values(), strict=False)]
    for line in overlay(curves):
        console.print(line, soft_wrap=True)
    width = min(20, max(len(printable(name)) for name in reports))
    columns = f"{'verdict':10}{'within':>7}{'1/2':>7}{'1/100':>7}{'1/1000':>7}{'×/step':>7}{'κ':>5}{'λ₁':>7}"
    console.print(f"\n   {'':{width}}  {columns}")
    for mark, (name, report) in zip(MARKS, reports.items(), strict=False):
        kind = report.verdict.kind
        line = f"{mark}  {_fitted(name, width):{width}}  {kind:10}{report.need.steps:>7}{_figures(report)}"
        console.print(Text(line, "green" if kind == "healthy" else ""), soft_wrap=True)
    for mark, name in zip(MARKS, reports, strict=False):
        if len(printable(name)) > width:  # whole, where the table has only its end
            console.print(Text(f"{mark}  {printable(name)}"), soft_wrap=True)
    for mark, report in zip(MARKS, reports.values(), strict=False):
        if report.fresh is not None:
            console.print(f"{mark}  {seeds_told(report.fresh, report.lags)}", soft_wrap=True)


def _fitted(name: str, width: int) -> str:
    shown = printable(name)
    return shown if len(shown) <= width else "…" + shown[1 - width :]


def write_comparison(reports: "dict[str, GradientReport]", folder: Path) -> list[str]:
    """Write compare-gradients.json and .png; return what to say about them.

    Raises:
        InputError: The folder can't be written.
    """
    from throughtime.insight.plots import draw_comparison

    text = to_json(comparison_record(reports), indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {folder}: can't be written: {error.strerror}; give another folder") from error
    try:
        draw_comparison(reports, folder / f"{NAME}.png")
    except InputError as error:
        return [f"wrote {NAME}.json to {folder}", str(error)]
    return [f"wrote {NAME}.json and {NAME}.png to {folder}"]


def comparison_record(reports: "dict[str, GradientReport]") -> dict[str, Any]:
    """Return a comparison as JSON holds it: the report of each, by name."""
    return {"subjects": {name: report.to_json() for name, report in reports.items()}}


def _figures(report: "GradientReport") -> str:
    top = report.top
    half, hundredth, thousandth = (_lag(reach) for reach in top.horizons)
    decay = "–" if math.isnan(top.decay) else f"{top.decay:.3f}"
    agreement = "–" if math.isnan(top.agreement) else f"{top.agreement:.2f}"
    largest = number(top.exponents[0], 3) if top.exponents else "–"
    return f"{half:>7}{hundredth:>7}{thousandth:>7}{decay:>7}{agreement:>5}{largest:>7}"


def _lag(reach: "Horizon") -> str:
    return "beyond" if reach.lag == math.inf else f"{reach.lag:.0f}"
