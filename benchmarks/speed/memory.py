"""Peak memory of training steps, and what the first call costs, each in a process of its own.

`python -m benchmarks.speed.memory throughtime|torch.nn THREADS` is that process; it prints one JSON object.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.problem import Problem
from benchmarks.speed.report import Line

GROUP = "memory"
STEPS, BATCH, HIDDEN = 128, 64, 256
_CALLS = 8


def compare(threads: int) -> tuple[dict[str, Any], list[Line]]:
    """Measure both in processes of their own; print and return what came."""
    if not Path("/proc/self/clear_refs").exists():
        print(f"{GROUP}: skipped, a process's peak is read from /proc, which only Linux has")
        return {}, []
    ours, theirs = (_measure(who, threads) for who in ("throughtime", "torch.nn"))
    name = f"lstm B{BATCH} T{STEPS} H{HIDDEN}, training"
    share, first = ours["peak_bytes"] / theirs["peak_bytes"], ours["first"] / ours["steady"]
    lines = [
        Line(GROUP, name, threads, "our peak / torch.nn's", share, share, share, "≤ 0.8", share <= 0.8),
        Line(GROUP, name, threads, "our first call / a steady one", first, first, first, "≤ 2", first <= 2),
    ]
    print(f"{GROUP}: {name}: {ours['peak_bytes'] / 1e6:.0f} MB against {theirs['peak_bytes'] / 1e6:.0f} MB")
    return {"case": f"{GROUP}: {name}", "threads": threads, "throughtime": ours, "torch.nn": theirs}, lines


def _measure(who: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed.memory", who, str(threads)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _kilobytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    assert match
    return int(match[1])


def main(who: str, threads: int) -> None:
    """Train a few steps and print the peak beyond what weights, input and the libraries took before."""
    torch.set_num_threads(threads)
    problem = Problem("lstm", STEPS, BATCH, HIDDEN)
    run = problem.by_us() if who == "throughtime" else problem.by_torch()
    warm = torch.ones(512, 512)
    for _ in range(20):  # torch's threads and its products' first calls are nobody's cost
        torch.mm(warm, warm)
    one = torch.ones(1, requires_grad=True)  # nor that its first backward pass imports a computer algebra system
    torch.autograd.backward(one * one, torch.ones(1))
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    seconds = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    peak = (_kilobytes("VmHWM") - before) * 1024
    print(json.dumps({"peak_bytes": peak, "first": seconds[0], "steady": statistics.median(seconds[2:])}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
