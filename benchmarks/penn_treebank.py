"""Penn Treebank words: train a published recipe, or a modern one of the same size, and measure it on the test text.

    python benchmarks/penn_treebank.py ptb/ --out runs --recipe zaremba-small
    python benchmarks/penn_treebank.py ptb/ --out runs --recipe medium-modern

The folder holds Mikolov's ptb.train.txt, ptb.valid.txt and ptb.test.txt. Runs the command line as a user would, goes on with a run
that was stopped, prints a table of its epochs, and one JSON object: perplexity per word, line ends included, the state carried
through the whole text. What came of it stands in docs/penn_treebank.md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Words as they stand in the files, 10,000 of them; trained on but for a thousandth, since there are files to test on.
WORDS = "--level word --no-split-punctuation --vocabulary 10000 --min-count 1 --split 0.999"
RECIPES = {
    "zaremba-small": "--preset zaremba-small --dtype bfloat16",
    "zaremba-medium": "--preset zaremba-medium --dtype bfloat16",
    "medium-modern": "--hidden 650 --layers 2 --embedding 650 --tied --locked --dropout 0.4 --embedding-dropout 0.1 --batch 32 "
    "--bptt 35 --lr 3e-3 --final-lr 0 --weight-decay 0.02 --clip 0.25 --dtype bfloat16 --epochs 20",
}


def run(*arguments: str) -> dict[str, Any]:
    """Call the command line with --json; return what it printed."""
    command = [sys.executable, "-m", "throughtime", *arguments, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def epochs(folder: Path) -> str:
    """Return a table of a run's epochs, made of its metrics: the training perplexity is that of the steps which were logged."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "raw_loss" in step]
    table = "| epoch | rate | train perplexity | seconds |\n|---|---|---|---|"
    for epoch in range(1, round(steps[-1]["epoch"]) + 1):
        own = [step for step in steps if epoch - 1 < step["epoch"] <= epoch]
        if own:
            perplexity = math.exp(statistics.mean(step["raw_loss"] for step in own))
            rate = own[len(own) // 2]["learning_rate"]
            table += f"\n| {epoch} | {rate:.3g} | {perplexity:.1f} | {own[-1]['seconds']:,.0f} |"
    return table


def main() -> None:
    """Train, test, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the three files are")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run, named like its recipe")
    parser.add_argument("--recipe", choices=RECIPES, default="zaremba-small")
    parser.add_argument("--minutes", help="a time instead of the recipe's epochs")
    given = parser.parse_args()
    folder = given.out / given.recipe
    if (folder / "checkpoint").exists():
        trained = run("train", "--resume", str(folder))
    else:
        budget = ["--minutes", given.minutes] if given.minutes else []
        flags = (*WORDS.split(), *RECIPES[given.recipe].split(), *budget)
        trained = run("train", str(given.folder / "ptb.train.txt"), "--out", str(folder), *flags)
    perplexity = {
        part: run("eval", str(folder), str(given.folder / f"ptb.{part}.txt"))["perplexity"]
        for part in ("valid", "test")
    }
    print(epochs(folder))
    print(
        json.dumps(
            {"recipe": given.recipe, "minutes": trained["seconds"] / 60, "steps": trained["steps"], **perplexity}
        )
    )


if __name__ == "__main__":
    main()
