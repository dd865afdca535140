"""Training by one process and by several: what do they come to, and how much faster are they?

    python -m benchmarks.ranks TEXT [--processes 1 2] [--steps 60] [--batch 64] [--hidden 256]

Each number of processes trains the same model on the same batches in turns, each process on one thread; all losses are compared
with the first one's. Prints the medians of updates a second over that one's; leave the machine alone meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TOLERANCE = 1e-4  # of the held-out loss, relative: float noise that training has amplified


def train(text: Path, processes: int, options: list[str], out: Path) -> dict[str, float]:
    """Train in so many processes; return what the first one reports."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *several, "-m", "throughtime", "train", str(text), "--out", str(out), "--json", *options]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Train and compare; the exit code is 1 where a loss is another one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args(arguments)
    options = [f"--{name}={getattr(given, name)}" for name in ("steps", "batch", "hidden")]
    rates: dict[int, list[float]] = {count: [] for count in given.processes}
    losses: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.turns):
            for count in given.processes:
                told = train(given.text, count, options, Path(folder) / f"{turn}-{count}")
                rates[count].append(told["steps"] / told["seconds"])
                losses[count] = told["nats_per_token"]
    first = given.processes[0]
    for count in given.processes:
        ratio = statistics.median(rates[count]) / statistics.median(rates[first])
        print(
            f"{count} processes: {statistics.median(rates[count]):.2f} updates/s, {ratio:.2f} of {first}; loss {losses[count]:.6f}"
        )
    return any(abs(loss - losses[first]) > TOLERANCE * losses[first] for loss in losses.values())


if __name__ == "__main__":
    sys.exit(main())
