"""How long the program takes to answer: help, mistakes, `--version`, and `info` beyond the import of torch.

    python -m benchmarks.startup [--turns 15]

Each call is a process of its own, from its start to its end; turns alternate, and what is told is the median. The targets are 0.3 s
for what needs no torch, and 0.5 s beyond torch's import for `info`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ANSWER, BEYOND_TORCH = 0.3, 0.5  # seconds
TORCH = "import torch"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        calls = {
            "--version": _program("--version"),
            "--help": _program("--help"),
            "train --help": _program("train", "--help"),
            "train --hiden 3 (a mistake)": _program("train", "--hiden", "3"),
            TORCH: [sys.executable, "-c", TORCH],
            "info run": _program("info", str(run)),
            "sample run --length 1": _program("sample", str(run), "--length", "1"),
        }
        medians = measure(calls, turns)
    torch = medians.pop(TORCH)
    print(f"| call | median of {turns}, s | beyond torch's {torch:.2f} s | target |\n|---|---|---|---|")
    missed = False
    for name, seconds in medians.items():
        needs_torch = name.split()[0] in ("info", "sample")
        figure, target = (seconds - torch, BEYOND_TORCH) if needs_torch else (seconds, ANSWER)
        missed |= figure > target
        print(f"| {name} | {seconds:.2f} | {f'{figure:.2f}' if needs_torch else '–'} | {target} |")
    return int(missed)


def make_run(folder: Path) -> Path:
    """Train for a few steps, so that there is a run to tell of."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    run = folder / "run"
    subprocess.run(_program("train", str(text), "--out", str(run), "--steps", "5"), check=True, capture_output=True)
    return run


def measure(calls: dict[str, list[str]], turns: int) -> dict[str, float]:
    """Return the median seconds of each command, which are called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # else our own files, and no others, would be compiled at each start
    for turn in range(turns + 1):
        for name, command in calls.items():
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False, env=environment)
            if turn:  # the first fills the disk's cache, and leaves bytecode as an installation has it
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "throughtime", *arguments]


if __name__ == "__main__":
    sys.exit(main())
