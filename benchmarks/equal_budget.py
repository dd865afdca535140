"""MLP, RNN, GRU and LSTM, each given the same time on the same text: a table and a picture.

    python -m benchmarks.equal_budget tinyshakespeare.txt --minutes 0.5 --out build/equal

Every cell is trained once with each learning rate for that many minutes of training time (evaluation and saving don't count),
at the same width, batch and window, and stands in the table with its best. The text is split 90/10; the loss is over the whole
held-out tenth, carried state. `--only CELL` trains one cell; what is in --out already isn't trained again, so a table can be
made in pieces.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from throughtime.app.plotting import plot_losses
from throughtime.lm import Run, TrainingOptions, open_run, train

CELLS = ("mlp", "rnn", "gru", "lstm")


def train_cell(text: Path, out: Path, cell: str, lr: float, minutes: float, hidden: int) -> None:
    """Train a cell at a rate, unless that was done."""
    folder = out / f"{cell}-{lr:g}"
    if (folder / "results.json").exists():
        options = open_run(folder).options
        assert (options["minutes"], options["hidden"]) == (minutes, hidden), (
            f"{folder} was made otherwise; give another --out"
        )
        return
    options = TrainingOptions(cell=cell, lr=lr, minutes=minutes, hidden=hidden, window=16)
    summary = train([text], folder, options)
    assert summary.evaluation is not None, "interrupted"
    print(f"{cell} at {lr:g}: {summary.evaluation.nats_per_token:.4f} after {summary.steps:,} steps", file=sys.stderr)


def best_runs(out: Path) -> list[tuple[str, Run]]:
    """Return the run of each cell that came to the lowest held-out loss, as far as there are any."""
    found = []
    for cell in CELLS:
        runs = [open_run(path.parent) for path in sorted(out.glob(f"{cell}-*/results.json"))]
        if runs:
            found.append((cell, min(runs, key=lambda run: held_out(run)["nats_per_token"])))
    return found


def held_out(run: Run) -> dict[str, Any]:
    """Return what a finished run came to on the held-out text."""
    results = run.results
    assert results is not None
    return results["held_out"]


def row(cell: str, run: Run) -> dict[str, Any]:
    """Return what the table tells of a run."""
    results = run.results
    assert results is not None
    nats = held_out(run)["nats_per_token"]
    return {
        "cell": cell,
        "model": run.model_config.describe(),
        "lr": run.options["lr"],
        "minutes": run.options["minutes"],
        "steps": results["training"]["steps"],
        "nats_per_character": nats,
        "bits_per_character": nats / math.log(2),
    }


def main() -> int:
    """Train, print the table and one JSON object, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[3e-3, 1e-2], help="learning rates to choose the best of"
    )
    parser.add_argument("--only", choices=CELLS, help="train this cell alone")
    parser.add_argument("--out", type=Path, default=Path("build/equal_budget"))
    given = parser.parse_args()
    for cell in (given.only,) if given.only else CELLS:
        for lr in given.lr:
            train_cell(given.text, given.out, cell, lr, given.minutes, given.hidden)
    runs = best_runs(given.out)
    rows = [row(cell, run) for cell, run in runs]
    print("| cell | rate | steps | nats per character | bits per character |\n|---|---|---|---|---|")
    for found in rows:
        figures = f"{found['nats_per_character']:.3f} | {found['bits_per_character']:.3f}"
        print(f"| {found['cell']} | {found['lr']:g} | {found['steps']:,} | {figures} |")
    picture = plot_losses([run for _, run in runs], given.out / "equal_budget.png")
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    record = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "picture": str(picture), "rows": rows}
    (given.out / "equal_budget.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
