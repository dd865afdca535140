"""The main job, measured: a text file in, a trained model and its held-out loss out; and the worked example, timed.

    python benchmarks/main_job.py tinyshakespeare.txt --minutes 3 --target 1.4697

Runs the command line as a user would, in a folder of its own, and prints one JSON object. The text is split 90/10; the
loss is over the whole held-out tenth with carried state. Exit code 1 if a target is missed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import throughtime


def run(*arguments: str) -> tuple[str, float]:
    """Call the command line; return what it printed and how long it took."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "throughtime", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, time.perf_counter() - began


def measure_training(text: Path, minutes: float, flags: list[str]) -> dict[str, Any]:
    """Train within a time budget, and evaluate the saved run once more from its files."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        printed, _ = run("train", str(text), "--out", out, "--minutes", str(minutes), "--json", *flags)
        trained = json.loads(printed.splitlines()[-1])
        held_out = Path(folder) / "held_out.txt"
        characters = text.read_text(encoding="utf-8")
        held_out.write_text(characters[int(0.9 * len(characters)) :], encoding="utf-8", newline="")
        again = json.loads(run("eval", out, str(held_out), "--json")[0])
    assert abs(again["nats_per_token"] - trained["nats_per_token"]) < 1e-4, (
        "the saved run does not score what was reported"
    )
    return {
        "nats_per_character": trained["nats_per_token"],
        "steps": trained["steps"],
        "training_seconds": trained["seconds"],
        "over_budget_seconds": trained["seconds"] - 60 * minutes,
    }


def measure_explanation(word: str, repeats: int = 5) -> dict[str, Any]:
    """Time the worked example, start of Python included, and see that it spells the word."""
    results = [run("explain", word) for _ in range(repeats)]
    assert all(word in printed for printed, _ in results)
    return {"word": word, "seconds": sorted(seconds for _, seconds in results)[repeats // 2]}


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--target", type=float, default=1.4697, help="nats per character to reach")
    parser.add_argument("--flags", default="", help="what else `train` is told; if nothing, the time chooses")
    given = parser.parse_args()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "throughtime": throughtime.__version__,
        "kernels": throughtime.backends().get("native"),
        "flags": given.flags,
        "minutes": given.minutes,
        "explain": measure_explanation("ybigta"),
        "training": measure_training(given.text, given.minutes, given.flags.split()),
    }
    print(json.dumps(result, indent=2))
    reached = result["training"]["nats_per_character"] <= given.target and result["explain"]["seconds"] < 5
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
