"""Measure throughtime's layers against their peers.

    python -m benchmarks.speed [--quick] [--case training ragged …] [--cell lstm …] [--threads 2 1] [--list]

Each case's contestants are checked against float64, warmed up, and timed in turns; a figure is a ratio of medians, its
quartiles are over the turns. Prints a table and writes all of it to bench-results/ as JSON. For figures worth reporting,
leave the machine alone meanwhile.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import memory
from benchmarks.speed.case import Case
from benchmarks.speed.cases import CELLS, PEERS, Choice, programme
from benchmarks.speed.report import Line, lines_of, machine, table, write_json
from benchmarks.speed.timing import WrongAnswerError, check, take_turns

_QUICK_BUDGET, _BUDGET = 0.5, 4.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = os.cpu_count() or 1
    groups = [*dict.fromkeys(case.group for case in programme(Choice())), memory.GROUP]
    parser.add_argument("--quick", action="store_true", help="a selection, in a minute, with all threads only")
    parser.add_argument("--case", nargs="+", choices=groups, default=groups, metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--match", default="", help="only cases whose line in --list contains this")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--peer", nargs="*", choices=list(PEERS), help="optional peers that take part (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", help=f"default: {min(cores, 2)} and 1")
    parser.add_argument("--budget", type=float, help=f"seconds a case (default: {_BUDGET:g}; quick: {_QUICK_BUDGET:g})")
    parser.add_argument("--kernels", action="store_true", help="time the kernels without layer and autograd, too")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON file")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    given = parser.parse_args()
    if given.threads is None:
        given.threads = [min(cores, 2)] if given.quick or cores == 1 else [min(cores, 2), 1]
    if given.peer is None:
        given.peer = [] if given.quick else list(PEERS)
    given.budget = given.budget or (_QUICK_BUDGET if given.quick else _BUDGET)
    return given


def _chosen(given: argparse.Namespace) -> list[Case]:
    choice = Choice(frozenset(given.peer), given.kernels)
    return [
        case
        for case in programme(choice)
        if case.group in given.case
        and case.cell in given.cell
        and given.match in _line(case)
        and (case.is_quick or not given.quick)
    ]


def _line(case: Case) -> str:
    return f"{case.group}: {case.cell} {case.name}"


def _measure(case: Case, threads: Sequence[int], budget: float) -> tuple[list[dict[str, Any]], list[Line]]:
    """Check and time a case with each number of threads; print what comes."""
    results, lines, exact = [], [], None
    for count in threads:
        if case.is_threaded and count < max(threads):
            continue
        torch.set_num_threads(count)
        contest = case.build()
        exact = exact or contest.exact()
        check(contest, exact)
        seconds = take_turns(contest.contestants, budget, block=contest.block)
        made = lines_of(case.group, f"{case.cell} {case.name}", count, case.figures, seconds, count == max(threads))
        for name, reason in contest.absent.items():
            print(f"{_line(case)}: without {name}, {reason}", flush=True)
        for line in made:
            print(
                f"{_line(case)}, {count} threads: {line.figure} {line.value:.2f} {line.target} {line.verdict}",
                flush=True,
            )
        results.append({"case": _line(case), "threads": count, "seconds": seconds})
        lines += made
    return results, lines


def main() -> int:
    """Run the chosen cases; exit code 1 if an answer was wrong."""
    given = _arguments()
    cases = _chosen(given)
    if given.list:
        for case in cases:
            print(_line(case) + (f" (skipped: {case.missing})" if case.missing else ""))
        return 0
    described, began = machine(), time.perf_counter()
    print(*(f"{key}: {value}" for key, value in described.items()), "", sep="\n")
    results: list[dict[str, Any]] = []
    lines: list[Line] = []
    wrong = 0
    for case in cases:
        if case.missing:
            print(f"{_line(case)}: skipped, {case.missing}", flush=True)
            continue
        try:
            made = _measure(case, given.threads, given.budget)
        except WrongAnswerError as error:
            print(f"{_line(case)}: NOT TIMED, {error}", flush=True)
            wrong += 1
            continue
        results += made[0]
        lines += made[1]
        gc.collect()
    if memory.GROUP in given.case and "lstm" in given.cell and not given.match:
        result, made = memory.compare(max(given.threads))
        results.append(result)
        lines += made
    print("", table(lines), "", sep="\n")
    missed = sum(line.reached is False for line in lines)
    reached = sum(line.reached is True for line in lines)
    path = write_json(given.out, described, results, lines)
    print(
        f"{reached} targets reached, {missed} missed, {wrong} answers wrong; {time.perf_counter() - began:.0f} s; {path}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
