"""What is printed and kept: the machine, a line a case, a table of figures, and a JSON file."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import throughtime
from benchmarks.speed.case import Figure
from benchmarks.speed.timing import quartiles
from throughtime.kernels import native

_PACKAGES = ("torch", "triton", "onnxruntime", "jax", "torchrl", "flashrnn", "numpy")


@dataclass(frozen=True)
class Line:
    """One figure of one case.

    Attributes:
        group: The case's part of the programme.
        case: Its name, cell included.
        threads: How many.
        figure: The figure's name.
        value: Made of medians over the turns.
        low: Lower quartile over the turns.
        high: Upper quartile.
        target: What it should be, with ≥ or ≤, or "".
        reached: Whether it is; `None` where nothing was asked.
    """

    group: str
    case: str
    threads: int
    figure: str
    value: float
    low: float
    high: float
    target: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return {None: "", True: "reached", False: "missed"}[self.reached]


def lines_of(
    group: str, case: str, threads: int, figures: Sequence[Figure], seconds: Mapping[str, Sequence[float]], judge: bool
) -> list[Line]:
    """Make a case's figures, of those whose contestants took part.

    Args:
        group: For the lines.
        case: For the lines.
        threads: For the lines.
        figures: What to make.
        seconds: Each contestant's times, turn by turn.
        judge: Whether targets are for this number of threads.
    """
    lines = []
    for figure in figures:
        if not all(name in seconds for name in figure.needs):
            continue
        value = figure.value(*(statistics.median(seconds[name]) for name in figure.needs))
        turns = [figure.value(*turn) for turn in zip(*(seconds[name] for name in figure.needs), strict=True)]
        target, reached = "", None
        if judge and figure.target is not None:
            target, reached = f"{'≤' if figure.at_most else '≥'} {figure.target:g}", figure.reached(value)
        lines.append(Line(group, case, threads, figure.name, value, *quartiles(turns), target, reached))
    return lines


def table(lines: Sequence[Line]) -> str:
    """Return the figures as a Markdown table."""
    head = ["", "case", "threads", "figure", "is", "quartiles", "target", ""]
    rows = [
        [
            *(line.group, line.case, str(line.threads), line.figure, f"{line.value:.2f}"),
            *(f"{line.low:.2f} – {line.high:.2f}", line.target, line.verdict),
        ]
        for line in lines
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    drawn = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(drawn)


def machine() -> dict[str, Any]:
    """Say where and with what the figures are measured."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "instruction_set": None if native.missing else native.instruction_set(),
        "throughtime": throughtime.__version__,
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def write_json(folder: Path, described: Mapping[str, Any], results: Sequence[Any], lines: Sequence[Line]) -> Path:
    """Write everything that was measured to a new file; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / time.strftime("speed-%Y%m%d-%H%M%S.json")
    content = {"machine": described, "figures": [asdict(line) for line in lines], "cases": results}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _processor() -> str:
    """Return the processor's name, with the numbers that tell kinds of the same name apart: Zen 4 is family 25, Zen 5 family 26."""
    path = Path("/proc/cpuinfo")
    said = path.read_text("utf-8") if path.exists() else ""
    found = {key: re.search(rf"^{key}\s*: (.*)$", said, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (match and match[1] for match in found.values())
    numbers = f" (family {family}, model {model})" if family and model else ""
    return f"{name}{numbers}" if name else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit, marked if the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
