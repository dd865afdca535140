"""`throughtime demo`: a character model of the Python standard library's own source, which every machine already has."""

import math
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from throughtime.app import errors
from throughtime.app.progress import display, observed
from throughtime.app.sampling import stream
from throughtime.app.terminal import note, results, under_way
from throughtime.errors import InputError
from throughtime.lm.baseline import NGramBaseline
from throughtime.lm.corpus import Corpus, build_corpus
from throughtime.lm.generation import Sampling
from throughtime.lm.presets import for_minutes
from throughtime.lm.run import CONFIG, DATA, check_new, clear_run, open_run, read_config
from throughtime.lm.training import TrainingOptions, train
from throughtime.plain import shell_word
from throughtime.training.locking import check_unlocked

MOST_BYTES = 4_000_000  # of source: more than is read in a minute
ORDERS = {1: "unigram", 3: "3-gram", 5: "5-gram"}
SAMPLE = Sampling(temperature=0.8)  # below, repetitions that source is full of: rows of "/", indentation
PROMPT, LENGTH = "def ", 600  # tokens
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


def run_demo(folder: Path, minutes: float = 1.0, *, most_bytes: int = MOST_BYTES, hidden: int | None = None) -> None:
    """Train, measure beside n-gram baselines, and write a sample; a run that is there already is replaced, its text reused.

    Args:
        folder: The run's folder.
        minutes: Training time.
        most_bytes: How much source to take.
        hidden: Hidden units; `None` lets the time choose.

    Raises:
        InputError: The folder holds something else than a run.
        typer.Exit: With 130, after Ctrl-C.
    """
    files = list(source_files(most_bytes))
    given = {"minutes": minutes, "hidden": hidden}
    chosen = for_minutes(given, sum(file.stat().st_size for file in files))
    options = TrainingOptions.from_values(chosen.options)
    _make_way(folder)
    with display(options.level) as shown:
        corpus = build_corpus(files, folder / DATA, options.level, on_progress=shown.reading)
        shown.say(f"text:  Python {platform.python_version()}'s standard library, {len(files)} files")
        if corpus.reused:
            shown.say(f"reused {_reused(folder)}")
        summary = train(files, folder, options, observed(shown, folder))
    if summary.evaluation is None:
        note(f"stopped and saved; go on with: throughtime train --resume {shell_word(folder)}")
        raise typer.Exit(errors.INTERRUPTED)

    run = open_run(folder)
    with under_way("counting n-grams for comparison"):
        scores = baselines(corpus)
    scores.append(Score(f"{run.model_config.cell.upper()}, {summary.seconds:.0f} s", summary.evaluation.nats_per_token))
    results().print(comparison(scores, summary.evaluation.tokens))
    results().print(f"\nA sample, at temperature {SAMPLE.temperature:g}:\n")
    stream(run, PROMPT, LENGTH, SAMPLE, seed=options.seed)
    note("")
    note(f'more: throughtime sample {shell_word(folder)} --prompt "class "')
    note("your own text: throughtime train book.txt --out run")


def source_files(most_bytes: int = MOST_BYTES) -> Iterator[Path]:
    """Yield the standard library's source files: top-level modules by name, then packages by name; without tests.

    Args:
        most_bytes: Files are yielded until the next one would go beyond.
    """
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(library.glob("*.py"))
    packages = sorted(path.parent for path in library.glob("*/__init__.py") if path.parent.name not in _LEFT_OUT)
    inside = (path for package in packages for path in sorted(package.rglob("*.py")))
    for path in (*modules, *inside):
        if set(path.relative_to(library).parts) & set(_LEFT_OUT) or not path.stat().st_size:
            continue
        most_bytes -= path.stat().st_size
        if most_bytes < 0:
            return
        yield path


@dataclass(frozen=True)
class Score:
    """How well a predictor does on the held-out text."""

    name: str
    nats: float


def baselines(corpus: Corpus) -> list[Score]:
    """Fit n-gram models to the text that is trained on, and score them on what is held out."""
    size = corpus.tokenizer.vocabulary_size
    return [
        Score(name, NGramBaseline(order).fit(corpus.train, size).nats_per_token(corpus.held_out))
        for order, name in ORDERS.items()
    ]


def comparison(scores: list[Score], held_out: int) -> Table:
    """Lay out scores below each other, the model's last and marked.

    Args:
        scores: Each predictor's.
        held_out: How many characters they were scored on.
    """
    table = Table(
        box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim", title_justify="left", title_style=""
    )
    table.title = Text(f"\nOn {held_out:,} characters that were not trained on", "bold")
    table.add_column("")
    for figure in ("nats per character", "bits per character", "perplexity"):
        table.add_column(figure, justify="right")
    for score in scores:
        style = "bold green" if score is scores[-1] else ""
        figures = (f"{score.nats:.3f}", f"{score.nats / math.log(2):.3f}", f"{math.exp(score.nats):.2f}")
        table.add_row("  " + score.name, *figures, style=style)
    return table


def _make_way(folder: Path) -> None:
    """Clear an earlier demo's run, but nothing else, and not its encoded text."""
    check_unlocked(folder)
    if (folder / CONFIG).exists():
        read_config(folder)  # raises if it is somebody else's
        clear_run(folder)
    try:
        check_new(folder)
    except InputError as error:
        raise InputError(
            f"{folder}: the demo writes its run here; move away what stands there, or run it elsewhere"
        ) from error


def _reused(folder: Path) -> str:
    environment = Path(sys.prefix)
    here = f" and the environment in {environment.name}" if environment.parent == Path.cwd() else ""
    return f"the encoded text in {folder / DATA}{here}"
