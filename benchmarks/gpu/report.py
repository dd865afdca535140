"""What is printed and kept: the machine, a table for each contest, ratios, and a JSON file."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.contest import RIGHT
from benchmarks.gpu.holding import Line, Row
from benchmarks.speed import report


def machine(device: torch.device, backend: str) -> dict[str, Any]:
    """Say where and with what the figures are measured."""
    described = report.machine() | {"device": device.type, "backend": backend}
    if device.type != "cuda":
        return described
    properties = torch.cuda.get_device_properties(device)
    return described | {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.split()
    except FileNotFoundError:
        return None
    return said[0] if said else None


def table(title: str, rows: Sequence[Row], lines: Sequence[Line]) -> str:
    """Return a contest's contestants, and under them its ratios."""
    head = ["contestant", "in", "forward ms", "+ backward ms", "error", "× judge's"]
    shown = [head, *(_cells(row) for row in rows)]
    whole = [cells for cells in shown if len(cells) == len(head)]
    widths = [max(len(cells[column]) for cells in (shown if column < 2 else whole)) for column in range(len(head))]
    out = [title]
    for cells in shown:
        last = "" if len(cells) == len(head) else "  " + cells.pop()
        out.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)) + last)
    for line in lines:
        ratio = f"{line.ours} / {line.peer}" if line.target.startswith("≤") else f"{line.peer} / {line.ours}"
        verdict = {None: "", True: f"   {line.target} reached", False: f"   {line.target} MISSED"}[line.reached]
        out.append(f"  {ratio}: forward {line.forward:.2f}, forward and backward {line.training:.2f}{verdict}")
    return "\n".join(line.rstrip() for line in out)


def _cells(row: Row) -> list[str]:
    """Return a row's cells; of one that wasn't timed the reason stands in place of times, as a third."""
    if row.status != RIGHT:
        return [row.contestant, row.numerics, f"{row.status}: {row.reason}"]
    times = [f"{median(times):.3f}" if times else "–" for times in (row.forward, row.training)]
    judged = "" if row.times_judge is None else f"{row.times_judge:.2f} × {row.judged_by}"
    return [row.contestant, row.numerics, *times, "" if row.error is None else f"{row.error:.1e}", judged]


def plain_table(lines: Mapping[str, Line], reasons: Mapping[str, str]) -> str:
    """Return the table of "auto"'s choice, from the ratios and what stands in their place by contest's title."""
    titles = [*lines, *reasons]
    groups = dict.fromkeys(title.rpartition(" B")[0] for title in titles)
    rows = sorted({int(title.rpartition(" B")[2]) for title in titles})
    head = "".join(f"B{batch}".rjust(7) for batch in rows)
    out = [
        "torch's time / ours, by B",
        f"  {'':22}{'training'.ljust(7 * len(rows) + 3)}forward",
        f"  {'':22}{head}   {head}",
    ]
    for group in groups:
        chosen = [lines.get(f"{group} B{batch}") for batch in rows]
        marks = [_mark(reasons.get(f"{group} B{batch}", "")) for batch in rows]
        training = "".join((f"{one.training:.2f}" if one else m).rjust(7) for one, m in zip(chosen, marks, strict=True))
        forward = "".join((f"{one.forward:.2f}" if one else m).rjust(7) for one, m in zip(chosen, marks, strict=True))
        out.append(f"  {group:22}{training}   {forward}")
    counts = {text: list(reasons.values()).count(text) for text in dict.fromkeys(reasons.values())}
    out += [f"  {count} not timed: {text}" for text, count in counts.items()]
    return "\n".join(out)


def _mark(text: str) -> str:
    return "WRONG" if "WRONG" in text else "–"


def write(path: Path, described: Mapping[str, Any], contests: Sequence[Mapping[str, Any]]) -> None:
    """Write everything that was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": described, "contests": contests}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def record(case: str, title: str, rows: Sequence[Row], lines: Sequence[Line]) -> dict[str, Any]:
    """Return what is kept of a contest."""
    return {
        "case": case,
        "title": title,
        "rows": [asdict(r) for r in rows],
        "figures": [asdict(line) for line in lines],
    }
