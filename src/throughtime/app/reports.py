"""What the commands print when they are done: the same facts as a table for a reader and as a record for a script."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from throughtime.app.terminal import duration, visible
from throughtime.lm.options import as_given
from throughtime.plain import printable, shell_word

if TYPE_CHECKING:
    from throughtime.lm.corpus import Corpus
    from throughtime.lm.evaluation import Evaluation
    from throughtime.lm.reading import LeftOut
    from throughtime.lm.run import Run
    from throughtime.lm.training import TrainingSummary

Row = tuple[str, str]

HELD_OUT = ("held-out text", "")
EVALUATION_KEYS = (
    *("nats_per_token", "bits_per_character", "bits_per_byte", "perplexity", "tokens", "method"),
    *("unknown", "nats_per_token_without_unknown", "perplexity_without_unknown"),
)
OF_SEQUENCES = ("perplexity_without_eos", "sequences")
UNITS = {"char": "characters", "byte": "bytes", "word": "words", "bpe": "tokens"}


def evaluation_record(evaluation: "Evaluation") -> dict[str, Any]:
    """Return the numbers of an evaluation and how they were got, two more where the text is made of sequences."""
    keys = EVALUATION_KEYS if evaluation.sequences is None else EVALUATION_KEYS + OF_SEQUENCES
    return {key: getattr(evaluation, key) for key in keys}


def evaluation_rows(evaluation: "Evaluation") -> list[Row]:
    """Return an evaluation as a reader wants it."""
    return _figures(evaluation_record(evaluation))


def training_record(summary: "TrainingSummary") -> dict[str, Any]:
    """Return what a training came to; the evaluation's numbers are null where it was interrupted."""
    measured: dict[str, Any] = (
        evaluation_record(summary.evaluation) if summary.evaluation else dict.fromkeys(EVALUATION_KEYS)
    )
    return {
        "run": str(summary.run),
        "steps": summary.steps,
        "seconds": round(summary.seconds, 3),
        "interrupted": summary.interrupted,
        "clip_share": summary.clip_share,
        "best_step": summary.best_step,
        "stopped_early": summary.stopped_early,
        "rollbacks": summary.rollbacks,
        "longer": None if summary.longer is None else asdict(summary.longer) | {"is_better": summary.longer.is_better},
        **measured,
    }


def training_rows(summary: "TrainingSummary") -> list[Row]:
    """Return what a training came to as a reader wants it."""
    return [
        ("trained", f"{duration(summary.seconds)}, {summary.steps:,} steps, {summary.clip_share:.0%} of them clipped"),
        *([("diverged", f"{summary.rollbacks} times, and went on at a lower rate")] if summary.rollbacks else []),
        *([("best weights", f"of step {summary.best_step:,}")] if summary.best_step else []),
        *_longer_rows(summary),
        *([HELD_OUT, *evaluation_rows(summary.evaluation)] if summary.evaluation else []),
    ]


def _longer_rows(summary: "TrainingSummary") -> list[Row]:
    """Return whether training a complete run longer made it better, and else that its weights stay."""
    if summary.longer is None:
        return []
    before, after = summary.longer.before, summary.longer.after
    if summary.longer.is_better:
        return [("longer", f"{after:.4f} nats per token, {before:.4f} before: the run has the new weights")]
    return [("longer", f"{after:.4f} nats per token, no better than {before:.4f} before: the run keeps its weights")]


def run_record(run: "Run") -> dict[str, Any]:
    """Return what a run is: its model, its data, the options it was trained with, and its results (null while there are none)."""
    return {
        "run": str(run.folder),
        "model": asdict(run.model_config) | {"parameters": run.model_config.parameter_count},
        "data": {"level": run.tokenizer.level} | _data_record(run),
        "options": run.options,
        "origin": _origin(run),
        "versions": run.config.versions,
        "packed": run.config.packed is not None,
        "results": run.results,
    }


def _origin(run: "Run") -> dict[str, Any] | None:
    """Return whose weights a run went on from: a name, a digest, and how many tokens were new."""
    origin = run.config.origin
    return None if origin is None else origin | {"weights": run.options.get("from_weights")}


def _origin_row(run: "Run") -> list[Row]:
    origin = _origin(run)
    if origin is None:
        return []
    name = f"{origin['run']}, " if "run" in origin else ""
    frozen = f", {run.options['freeze']} held still" if run.options.get("freeze") else ""
    frozen += ", no others were let in" if not run.options.get("grow_vocabulary", True) else ""
    return [("from", f"{name}weights {str(origin['weights'])[:16]}…, {origin['new_tokens']:,} tokens new{frozen}")]


def _data_record(run: "Run") -> dict[str, Any]:
    """Return what a run's text was; of a packed run, which lacks it, its size alone."""
    if run.config.packed is not None:
        return run.config.packed
    corpus = run.corpus()
    return {
        "files": [source["path"] for source in corpus.sources],
        "left_out": [left_out._asdict() for left_out in corpus.left_out],
        "copies": copies(corpus),
        "train_tokens": len(corpus.train),
        "held_out_tokens": len(corpus.held_out),
    }


def run_rows(run: "Run") -> list[Row]:
    """Return what a run is as a reader wants it."""
    rows = [
        ("model", run.model_config.describe()),
        ("vocabulary", f"{run.model_config.vocabulary_size:,} ({run.tokenizer.level})"),
        *_data_rows(run),
        *_origin_row(run),
        ("options", _describe_options(run.options)),
        *([("versions", describe_versions(run.config.versions))] if run.config.versions else []),
    ]
    results = run.results
    if results is None and run.config.packed is not None:
        return [*rows, ("results", "none, it was packed before its training was done")]
    if results is None:
        return [*rows, ("results", f"none yet; go on with: throughtime train --resume {shell_word(run.folder)}")]
    training, held_out = results["training"], results["held_out"]
    rows.append(("trained", f"{duration(training['seconds'])}, {training['steps']:,} steps"))
    return [*rows, *_stage_rows(run, training), HELD_OUT, *_figures(held_out)]


def _stage_rows(run: "Run", training: dict[str, Any]) -> list[Row]:
    """Return how a run was trained longer than was planned: what each stage ended with, and whether one is under way."""
    rows = []
    if stages := training.get("stages"):
        ends = (f"{stage['nats_per_token']:.4f} after {stage['steps']:,} steps" for stage in stages)
        rows.append(("stages", f"{', '.join(ends)} (nats per token, held out)"))
    if training["best_step"]:
        rows.append(("best weights", f"of step {training['best_step']:,}"))
    steps = (line.get("step") for line in run.metrics() if "event" not in line)
    since = max((step for step in steps if isinstance(step, int)), default=0) - training["steps"]
    if since > 0:
        more = f"{since:,} steps since, of a stage that isn't done; go on with: throughtime train --resume {shell_word(run.folder)}"
        rows.append(("longer", more))
    return rows


def _data_rows(run: "Run") -> list[Row]:
    data = _data_record(run)
    tokens = []
    if "train_tokens" in data:
        tokens = [("tokens", f"{data['train_tokens']:,} to train on, {data['held_out_tokens']:,} held out")]
    if run.config.packed is not None:
        return [("text", "not here, the run was packed to be shared"), *tokens]
    left_out = enumerate(_left_out_lines(run.corpus()))
    return [
        ("text", _describe_files(data["files"])),
        *[("left out" if place == 0 else "", line) for place, line in left_out],
        *tokens,
    ]


def describe_versions(versions: dict[str, Any]) -> str:
    """Return what a run was written by in a line: "throughtime 0.1.0, torch 2.13.0, format 1"."""
    return ", ".join(f"{part} {version}" for part, version in versions.items())


def headline(run: "Run") -> str:
    """Return what is about to be trained, and on what, in two lines; in a third, what was found and isn't trained on."""
    corpus = run.corpus()
    units = UNITS[run.tokenizer.level]
    lines = [
        f"model: {run.model_config.describe()}",
        f"data:  {len(corpus.train):,} {units} to train on, {len(corpus.held_out):,} held out",
    ]
    lines += _of_origin(run, corpus)
    if corpus.left_out:
        lines.append(
            f"left out: {left_out_in_short(corpus.left_out)}; throughtime info {shell_word(run.folder)} tells more"
        )
    if same := copies(corpus):
        lines.append(
            f"copies: {_several(len(same), 'file')} with the text of another, first {same[0]}; "
            "what is held out may be trained on too"
        )
    return "\n".join(lines)


def _of_origin(run: "Run", corpus: "Corpus") -> list[str]:
    """Return, of a run that goes on from another's weights, what is new to them and what stays unknown."""
    from throughtime.lm.next_token import token_names

    origin = run.config.origin
    if origin is None:
        return []
    new, unknown_id = origin["new_tokens"], run.tokenizer.unknown_id
    names = " ".join(map(visible, token_names(run.tokenizer)[len(token_names(run.tokenizer)) - new :][:_MOST_LISTED]))
    more = f" and {new - _MOST_LISTED:,} more" if new > _MOST_LISTED else ""
    told = f"{_several(new, 'token')} new to them: {names}{more}" if new else "no token new to them"
    unknown = 0 if unknown_id is None else int((corpus.train == unknown_id).sum())
    share = f"; {unknown / len(corpus.train):.2%} of the text unknown" if unknown else ""
    return [f"from:  the weights of {origin.get('run', 'another run')}, {told}{share}"]


def left_out_in_short(left_out: "Sequence[LeftOut]") -> str:
    """Return what was left out by kinds, each with how many they are and which comes first.

    Example:
        >>> from throughtime.lm.reading import LeftOut
        >>> left_out_in_short([LeftOut("a/run", "run", "a run, not text"), LeftOut("a/b", "again", "the same file as b")])
        '1 run, first a/run; 1 file met again, first a/b (the same file as b)'
    """
    parts = []
    for kind, (name, after) in _LEFT_OUT.items():
        found = [each for each in left_out if each.kind == kind]
        if found:
            reason = f" ({found[0].reason})" if kind in ("no text", "again", "unreadable") else ""
            parts.append(f"{_several(len(found), name)}{after}, first {found[0].path}{reason}")
    return "; ".join(parts)


_LEFT_OUT = {
    "no text": ("file", " not UTF-8 text"),
    "unreadable": ("folder", " that can't be read"),
    "run": ("run", ""),
    "link": ("link", " to folders"),
    "again": ("file", " met again"),
}
_MOST_LISTED = 20


def _left_out_lines(corpus: "Corpus") -> list[str]:
    lines = [f"{each.path}: {each.reason}" for each in corpus.left_out[:_MOST_LISTED]]
    more = len(corpus.left_out) - len(lines)
    return lines + ([f"and {more:,} more; --json lists them all"] if more else [])


def copies(corpus: "Corpus") -> list[str]:
    """Return the files that hold, byte for byte, the text of one before them."""
    seen: set[str] = set()
    found = []
    for source in corpus.sources:
        if source["bytes"] and source["sha256"] in seen:
            found.append(source["path"])
        seen.add(source["sha256"])
    return found


def _several(count: int, name: str) -> str:
    return f"{count:,} {name}" + "s" * (count != 1)


def _describe_files(files: list[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")


def _describe_options(options: dict[str, Any]) -> str:
    """Return the options that the other rows don't already tell, as they would be given."""
    from throughtime.lm.model import OPTIONS_OF_SHAPE

    told = {"level", "from_weights", "grow_vocabulary", "freeze"} | set(OPTIONS_OF_SHAPE)
    given = {name: value for name, value in options.items() if name not in told and value is not None}
    return "  ".join(as_given(name, value) for name, value in given.items())


def _figures(held_out: dict[str, Any]) -> list[Row]:
    method = held_out.get("method")
    return [
        *([("read", f"with {method}" if "state" in method[:14] else f"in {method}")] if method else []),
        ("tokens predicted", f"{held_out['tokens']:,}"),
        ("nats per token", f"{held_out['nats_per_token']:.4f}"),
        ("bits per character", f"{held_out['bits_per_character']:.4f}"),
        ("bits per byte", f"{held_out['bits_per_byte']:.4f}"),
        ("perplexity", f"{held_out['perplexity']:,.3f}"),
        *_unknown_rows(held_out),
        *(
            [
                ("without ends", f"{held_out['perplexity_without_eos']:,.3f}"),
                ("sequences", f"{held_out['sequences']:,}"),
            ]
            if held_out.get("sequences") is not None
            else []
        ),
    ]


def _unknown_rows(held_out: dict[str, Any]) -> list[Row]:
    """Return how much was unknown, and the figures without it."""
    if not held_out.get("unknown"):
        return []
    share = held_out["unknown"] / held_out["tokens"]
    nats, perplexity = (held_out.get(f"{name}_without_unknown") for name in ("nats_per_token", "perplexity"))
    without = [] if nats is None else [("without unknown", f"{nats:.4f} nats per token, perplexity {perplexity:,.3f}")]
    return [("unknown", f"{held_out['unknown']:,} of {held_out['tokens']:,} tokens, {share:.2%}"), *without]


@dataclass(frozen=True)
class Facts:
    """Facts to print under a title: what each is, and beside it the figure, or under it where the console is narrow.

    Figures are broken where there are two spaces, and elsewhere only if a part is longer than a line.

    Attributes:
        title: What they are of.
        rows: Each with its name.
    """

    title: str
    rows: list[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay them out in the width that there is."""
        names = [Text(printable("  " + name), "dim") for name, _ in self.rows]
        beside = options.max_width - max((name.cell_len for name in names), default=0) - _GAP
        is_wide = beside >= _NARROW
        width = beside if is_wide else max(options.max_width - _INDENT, 1)
        figures = [Text(_broken(printable(figure), width), overflow="fold") for _, figure in self.rows]
        if not is_wide:
            yield Text(printable(self.title), "bold", overflow="fold")
            for name, figure in zip(names, figures, strict=True):
                name.overflow = "fold"
                yield name
                if figure.plain:
                    yield Padding(figure, (0, 0, 0, options.max_width - width))
            return
        laid_out = Table(
            box=None,
            show_header=False,
            pad_edge=False,
            padding=(0, _GAP, 0, 0),
            title=Text(printable(self.title), "bold"),
        )
        laid_out.title_justify = "left"
        laid_out.title_style = ""
        laid_out.add_column(no_wrap=True)
        laid_out.add_column(overflow="fold")
        for name, figure in zip(names, figures, strict=True):
            laid_out.add_row(name, figure)
        yield laid_out


_GAP, _NARROW, _INDENT = (
    3,
    20,
    4,
)  # columns: between a name and its figure; fewer than this is no room; of a figure below


def _broken(figure: str, width: int) -> str:
    """Return a figure in lines of some width, where two spaces let it be broken."""
    lines: list[str] = []
    for part in figure.split("  "):
        if lines and cell_len(lines[-1]) + 2 + cell_len(part) <= width:
            lines[-1] += "  " + part
        else:
            lines.append(part)
    return "\n".join(lines)
