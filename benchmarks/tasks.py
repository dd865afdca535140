"""Who solves which long-memory task: each over several seeds, beside how far its gradients reach at the end.

    python benchmarks/tasks.py                        # adding and order, LSTM and RNN, five seeds
    python benchmarks/tasks.py --tasks lag,copy --cells gru,lstm

Prints a line for each and one JSON object. Exit code 1 unless LSTM solves adding (T 100) and temporal order (T 50) with every
seed and the RNN neither, where those were run.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from typing import Any

import torch

import throughtime
from throughtime import insight

EXPECTED = {("adding", "lstm"): True, ("order", "lstm"): True, ("adding", "rnn"): False, ("order", "rnn"): False}


def measure(name: str, cell: str, seeds: int, steps: int, hidden: int) -> dict[str, Any]:
    """Train one cell on one task with each seed."""
    task = insight.make_task(name)
    cpu_began = time.process_time()
    # The plain RNN as torch starts it: an orthogonal start is a remedy, and the next row of the question.
    results = [
        insight.solve(
            task,
            cell,
            hidden_size=hidden,
            steps=steps,
            seed=seed,
            initialisation="default" if cell == "rnn" else None,
        )
        for seed in range(1, seeds + 1)
    ]
    reached = [r.horizon.lag for r in results if r.horizon is not None]
    return {
        "task": name,
        "cell": cell,
        "length": task.length,
        "lag_needed": task.lag,
        "chance": task.chance,
        "solved": sum(r.solved for r in results),
        "seeds": seeds,
        "scores": [round(r.score, 4) for r in results],
        "steps": [r.steps for r in results],
        "seconds": round(sum(r.seconds for r in results), 1),
        "cpu_seconds": round(time.process_time() - cpu_began, 1),  # says more where the machine has other work
        "horizon": None if not reached or statistics.median(reached) == math.inf else statistics.median(reached),
    }


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="adding,order")
    parser.add_argument("--cells", default="rnn,lstm")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=64)
    given = parser.parse_args()
    began, rows = time.perf_counter(), []
    for name in given.tasks.split(","):
        for cell in given.cells.split(","):
            row = measure(name, cell, given.seeds, given.steps, given.hidden)
            rows.append(row)
            print(
                f"{name:12}{cell:6}solved {row['solved']} of {row['seeds']}, scores {row['scores']}, steps {row['steps']}, "
                f"{row['seconds']} s ({row['cpu_seconds']} of a core), horizon {row['horizon'] or 'beyond'} of {row['lag_needed']}",
                flush=True,
            )
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "throughtime": throughtime.__version__,
        "seconds": round(time.perf_counter() - began, 1),
        "tasks": rows,
    }
    print(json.dumps(result, indent=2))
    as_expected = [
        row["solved"] == (row["seeds"] if wanted else 0)
        for row in rows
        if (wanted := EXPECTED.get((row["task"], row["cell"]))) is not None
    ]
    return 0 if all(as_expected) else 1


if __name__ == "__main__":
    sys.exit(main())
