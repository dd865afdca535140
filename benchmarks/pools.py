"""Layers that aren't alone: beside other threads of the same process, a busy process, and on one core.

    python -m benchmarks.pools [--beside onnxruntime process …] [--case 0 1 …] [--threads 2] [--turns 25]

A turn is calls with the machine at rest, and the same calls beside somebody: each at once after he has worked, when his threads
still spin, or while he works. It is taken by throughtime and by torch.nn, and the figures are medians over the turns: each one's
calls beside the other, in its own calls at rest, torch.nn's time over ours beside him, and how many of our native passes found no
core for their threads and worked alone. `turns` is a call of torch.nn's at once before each of ours: how many of 200 took the time
of one thread. Each situation has a process of its own, since OpenMP reads its settings but once. Answers are checked before any
time is taken. All of it goes to bench-results/ as JSON. Leave the machine alone meanwhile.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.case import OURS, Contest, Contestant
from benchmarks.speed.neighbour import busy_neighbour
from benchmarks.speed.problem import Problem
from benchmarks.speed.report import machine
from benchmarks.speed.timing import SETTLE, check
from throughtime.kernels import native

PEER = "torch.nn"
PROBLEMS = [
    Problem("lstm", 128, 64, 256, training=False),
    Problem("lstm", 100, 32, 128),
    Problem("lstm", 30, 16, 64),
    Problem("gru", 100, 32, 128),
    Problem("rnn", 100, 32, 128, training=False),
]
CALLERS = 8  # Python threads that call at the same time
POLICIES = {"torch": None, "torch active": "active", "torch passive": "passive"}
SITUATIONS = [*POLICIES, "onnxruntime", "process", "callers", "one core", "turns"]
BLOCK = 0.05  # seconds at rest of the calls of a turn, since a layer learns from a call for the next one
MOST = 1.0  # seconds of them at most, beside somebody: spinning threads wait for a time slice at each meeting
AT_ONE_THREADS_TIME = 0.9  # of one thread's median: a call that took so long had one thread

Call = Callable[[], Any]


def line_of(problem: Problem) -> str:
    """Name a problem in short."""
    kind = "training" if problem.training else "inference"
    return f"{problem.cell} B{problem.batch} T{problem.steps} H{problem.hidden}, {kind}"


def torch_product(problem: Problem) -> Call:
    """Return a product that all of torch's threads compute, and after which they spin."""
    a = torch.randn(512, 512)
    return lambda: a @ a


def onnx_session(problem: Problem) -> Call:
    """Return a run of the layer in a session of ONNX Runtime's, whose threads spin after it."""
    from benchmarks.speed.onnx_peer import runner

    return runner(problem)


def nothing(problem: Problem) -> Call:
    """Return what does nothing."""
    return lambda: None


def _by_many(call: Call) -> Call:
    """Return what makes a call in each of several Python threads at the same time."""

    def calls() -> None:
        threads = [threading.Thread(target=call) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return calls


@contextmanager
def _one_core() -> Iterator[None]:
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    before = {task: os.sched_getaffinity(task) for task in tasks}
    for task, cores in before.items():
        os.sched_setaffinity(task, {min(cores)})
    try:
        yield
    finally:
        for task, cores in before.items():
            os.sched_setaffinity(task, cores)


def _beside(situation: str, problem: Problem) -> tuple[Call, Callable[[], AbstractContextManager[None]]]:
    """Return who works just before a call, and what holds while it runs."""
    if situation in POLICIES:
        return torch_product(problem), nullcontext
    around = {"process": busy_neighbour, "one core": _one_core}.get(situation, nullcontext)
    return (onnx_session if situation == "onnxruntime" else nothing)(problem), around


def _seconds(call: Call, before: Call | None = None, repeats: int = 1) -> float:
    """Return the mean of some calls, each after another one that isn't timed: of fewer where they take more than `MOST`."""
    seconds, made = 0.0, 0
    while made < repeats and seconds < MOST:
        if before:
            before()
        start = time.perf_counter()
        call()
        seconds += time.perf_counter() - start
        made += 1
    return seconds / made


def measure(situation: str, problem: Problem, turns: int) -> dict[str, Any]:
    """Check both answers and time both, at rest and beside somebody, in turns."""
    ours, theirs = problem.by_us(), problem.by_torch()
    contest = Contest(
        [Contestant(OURS, ours, judged_by=PEER), Contestant(PEER, theirs)], problem.by_torch(torch.float64)
    )
    check(contest, contest.exact())
    if situation == "turns":
        return _in_turns(ours, theirs, 200)
    before, around = _beside(situation, problem)
    many = _by_many if situation == "callers" else lambda call: call
    calls = {OURS: many(ours), PEER: many(theirs)}
    for call in (before, *calls.values()):
        call()
    callers = CALLERS if situation == "callers" else 1
    repeats = math.ceil(BLOCK / callers / min(_seconds(ours), _seconds(theirs)))
    rest: dict[str, list[float]] = {OURS: [], PEER: []}
    beside: dict[str, list[float]] = {OURS: [], PEER: []}
    met = alone = 0
    for _ in range(turns):
        for name, single in ((OURS, ours), (PEER, theirs)):
            time.sleep(SETTLE)
            rest[name].append(_seconds(single, repeats=repeats))
        for name, call in calls.items():
            time.sleep(SETTLE)
            with around():
                was = native.meetings()
                beside[name].append(_seconds(call, before, repeats) / callers)
                now = native.meetings()
            met, alone = met + now.teams - was.teams, alone + now.alone - was.alone
    medians = {name: (statistics.median(rest[name]), statistics.median(beside[name])) for name in calls}
    return {
        "beside / at rest, ours": medians[OURS][1] / medians[OURS][0],
        "beside / at rest, torch.nn": medians[PEER][1] / medians[PEER][0],
        "torch.nn / ours, beside": medians[PEER][1] / medians[OURS][1],
        "alone": alone / max(met + alone, 1),
        "seconds": {"rest": rest, "beside": beside},
    }


def _in_turns(ours: Call, theirs: Call, count: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single = statistics.median(_seconds(ours) for _ in range(5))
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    was = native.meetings()
    for _ in range(count):
        seconds[PEER].append(_seconds(theirs))
        seconds[OURS].append(_seconds(ours))
    now = native.meetings()
    teams, alone = now.teams - was.teams, now.alone - was.alone
    return {
        "torch.nn / ours, beside": statistics.median(seconds[PEER]) / statistics.median(seconds[OURS]),
        "as slow as one thread": sum(it >= AT_ONE_THREADS_TIME * single for it in seconds[OURS]),
        "one thread / ours": single / statistics.median(seconds[OURS]),
        "alone": alone / max(teams + alone, 1),
        "seconds": seconds,
    }


def _child(situation: str, cases: list[int], threads: int, turns: int) -> dict[str, Any]:
    """Measure a situation in a process with its settings."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if policy := POLICIES.get(situation):
        environment["OMP_WAIT_POLICY"] = policy
    options = ["--threads", str(threads), "--turns", str(turns), "--case", *map(str, cases), "--measure", situation]
    command = [sys.executable, "-m", "benchmarks.pools", *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    """Measure the situations that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", nargs="+", choices=SITUATIONS, default=SITUATIONS)
    parser.add_argument(
        "--case", nargs="+", type=int, default=list(range(len(PROBLEMS))), help="which shapes, by number"
    )
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON file")
    parser.add_argument("--measure", choices=SITUATIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    problems = {line_of(PROBLEMS[number]): PROBLEMS[number] for number in given.case}
    if given.measure:
        torch.set_num_threads(given.threads)
        print(json.dumps({name: measure(given.measure, problem, given.turns) for name, problem in problems.items()}))
        return 0
    found = {}
    for situation in given.beside:
        if situation == "onnxruntime" and not importlib.util.find_spec("onnxruntime"):
            print("onnxruntime: skipped, it isn't installed", flush=True)
            continue
        found[situation] = _child(situation, given.case, given.threads, given.turns)
        for name, figures in found[situation].items():
            shown = ", ".join(f"{key} {value:.2f}" for key, value in figures.items() if key != "seconds")
            print(f"{situation:13}  {name:30}  {shown}", flush=True)
    given.out.mkdir(exist_ok=True)
    path = given.out / f"pools-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": machine() | {"threads": given.threads}, "found": found}), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
