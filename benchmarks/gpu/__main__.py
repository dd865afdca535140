"""Check and time throughtime's layers on a GPU against everything else that computes them there.

    python -m benchmarks.gpu [--case resets ragged …] [--json FILE]

Every contestant's output and gradients are compared with float64 before it is timed: a peer's have to be sane, ours may err
three times what a named peer errs in the same numerics. Times are medians over turns that alternate. What can't take part says
why, and the rest goes on. By default no contest begins after 235 s, compilation included; leave the GPU alone
meanwhile. Peers that aren't installed (torchrl, flashrnn) are left out.
Exit code 1: an answer was wrong, or ours failed. `--device cpu --quick` tries the program without a GPU.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import throughtime
from benchmarks.gpu import report
from benchmarks.gpu.cases import Setting, cases
from benchmarks.gpu.contest import FAILED, LEFT_OUT, RIGHT, WRONG, Contest
from benchmarks.gpu.holding import Row, hold, lines
from benchmarks.gpu.preparation import KEPT, prepare, run_once
from benchmarks.gpu.timing import Pace

PLAIN = "plain"
PLAIN_LIMIT = 80.0  # seconds for all of its sizes


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    names = list(cases(Setting(torch.device("cpu"), "auto")))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--backend", help='throughtime\'s (default: "triton" where it is there, else "auto")')
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few turns, to try the program")
    parser.add_argument("--turns", type=int, help="the most turns of a contestant (default: 20; quick: 3)")
    parser.add_argument("--prepare", type=float, default=85.0, help="seconds for compilation beforehand (default: 85)")
    parser.add_argument("--each", type=float, default=70.0, help="seconds for compiling one contestant (default: 70)")
    parser.add_argument(
        "--limit", type=float, default=235.0, help="seconds after which no contest begins (default: 235)"
    )
    parser.add_argument("--once", nargs=2, metavar=("CASE", "NAME"), help="compile what has this name, and stop")
    parsed = parser.parse_args(given)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the program without one")
    parsed.backend = parsed.backend or ("triton" if "triton" in throughtime.backends() else "auto")
    parsed.turns = parsed.turns or (3 if parsed.quick else 20)
    return parsed


def main(given: Sequence[str] | None = None) -> int:
    """Run the chosen cases; exit code 1 if an answer was wrong or ours failed."""
    began = time.monotonic()
    parsed = _arguments(given)
    os.environ.update(KEPT)
    setting = Setting(torch.device(parsed.device), parsed.backend, parsed.quick)
    if parsed.once:
        torch.set_num_threads(1)  # the others compile beside it
        run_once(setting, *parsed.once)
        return 0
    described = report.machine(setting.device, setting.backend)
    print(*(f"{key}: {value}" for key, value in described.items()), "", sep="\n", flush=True)
    unprepared: dict[str, dict[str, str]] = {}
    if setting.device.type == "cuda" and parsed.prepare:
        options = ["--device", parsed.device, "--backend", parsed.backend, *(["--quick"] if parsed.quick else [])]
        unprepared = prepare(setting, parsed.case, parsed.prepare, parsed.each, options)
        print(f"compilation beforehand took {time.monotonic() - began:.0f} s\n", flush=True)
    end = began + parsed.limit
    pace = Pace(parsed.turns, limit=0.1, block=0.0) if parsed.quick else Pace(parsed.turns)
    contests, rows = [], []
    for name in parsed.case:
        if name == PLAIN:
            made = _plain(setting, pace, min(end, time.monotonic() + PLAIN_LIMIT))
        else:
            made = _case(name, setting, pace, end, unprepared.get(name, {}))
        contests += made[0]
        rows += made[1]
        if parsed.json:
            report.write(parsed.json, described | {"seconds": round(time.monotonic() - began, 1)}, contests)
    return _conclude(rows, contests, began)


def _case(
    name: str, setting: Setting, pace: Pace, end: float, unprepared: dict[str, str]
) -> tuple[list[dict[str, Any]], list[Row]]:
    """Hold a case's contests and print their tables; return what is kept, and the rows."""
    kept, rows = [], []
    for contest in cases(setting)[name]():
        found = _held(contest, setting, pace, end, unprepared)
        made = lines(found, contest.figures, setting.has_targets)
        print(report.table(f"{name}: {contest.title}", found, made), "", sep="\n", flush=True)
        kept.append(report.record(name, contest.title, found, made))
        rows += found
    return kept, rows


def _plain(setting: Setting, pace: Pace, end: float) -> tuple[list[dict[str, Any]], list[Row]]:
    """Hold the many small contests of "auto"'s choice; print one table of them all."""
    pace = replace(pace, turns=min(pace.turns, 4), limit=0.1, block=min(pace.block, 4.0), check=10.0)
    kept, rows, ratios, reasons = [], [], {}, {}
    for contest in cases(setting)[PLAIN]():
        found = _held(contest, setting, pace, end, {})
        made = lines(found, contest.figures, setting.has_targets)
        if made:
            ratios[contest.title] = made[0]
        else:
            row = next(row for row in found if row.status != RIGHT)
            reasons[contest.title] = f"{row.contestant}, {row.status}: {row.reason}"
        kept.append(report.record(PLAIN, contest.title, found, made))
        rows += found
    print(report.plain_table(ratios, reasons), "", sep="\n", flush=True)
    return kept, rows


def _held(contest: Contest, setting: Setting, pace: Pace, end: float, unprepared: dict[str, str]) -> list[Row]:
    """Hold a contest where there is time for it, and free what it leaves."""
    left = end - time.monotonic()
    if left <= 0:
        return [Row(one.name, one.numerics.name, one.is_ours, reason="time is over") for one in contest.contestants]
    rows = hold(contest, setting.device, replace(pace, check=min(pace.check, max(left, 1.0))), unprepared)
    gc.collect()
    return rows


def _conclude(rows: Sequence[Row], contests: Sequence[dict[str, Any]], began: float) -> int:
    reached = [figure["reached"] for contest in contests for figure in contest["figures"]]
    wrong = sum(row.status == WRONG for row in rows)
    failed = [sum(row.status == FAILED and row.is_ours is ours for row in rows) for ours in (True, False)]
    print(
        f"{reached.count(True)} targets reached, {reached.count(False)} missed; {wrong} answers wrong; failed: {failed[0]} of "
        f"ours, {failed[1]} peers; left out: {sum(row.status == LEFT_OUT for row in rows)}; {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong or failed[0] else 0


if __name__ == "__main__":
    sys.exit(main())
