"""What `throughtime eval` measures, and how it is shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from throughtime.app.reports import UNITS, Facts, Row, evaluation_record, evaluation_rows
from throughtime.app.terminal import results, under_way
from throughtime.errors import InputError
from throughtime.lm.adaptive import DynamicEvaluation, NeuralCache, evaluate_adaptively
from throughtime.lm.baseline import NGramBaseline
from throughtime.lm.corpus import read_tokens
from throughtime.lm.evaluation import Evaluation, PositionLoss, evaluate, loss_by_position

if TYPE_CHECKING:
    from throughtime.lm.run import Run


@dataclass(frozen=True)
class Reading:
    """How a text is to be read: what the command line's flags say, `None` where they weren't given."""

    cold: int | None
    by_position: bool
    dynamic: str | None
    dynamic_options: dict[str, Any]
    cache: int | None
    cache_options: dict[str, Any]
    ngram: int | None
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.precision != "float32" and (self.by_position or self.dynamic or self.cache):
            raise InputError(
                f"--precision {self.precision} is for a text that is only read; expected no --by-position, --dynamic or --cache"
            )
        if (self.cold is not None or self.by_position) and (self.dynamic or self.cache):
            given = "--cold" if self.cold is not None else "--by-position"
            raise InputError(
                f"{given} reads from fresh states; --dynamic and --cache carry on: expected one or the other"
            )

    @property
    def dynamic_evaluation(self) -> DynamicEvaluation | None:
        """How weights follow the text."""
        names = {"dynamic_lr": "learning_rate", "dynamic_decay": "decay", "segment": "segment"}
        return None if self.dynamic is None else DynamicEvaluation(self.dynamic, **_given(self.dynamic_options, names))

    def neural_cache(self, length: int) -> NeuralCache | None:
        """Return what is remembered of a text of so many tokens."""
        names = {"cache_weight": "weight", "cache_sharpness": "sharpness"}
        size = None if self.cache is None else min(self.cache, max(length, 1))
        return None if size is None else NeuralCache(size, **_given(self.cache_options, names))


def _given(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Measured:
    """What was measured of a text."""

    evaluation: Evaluation
    positions: PositionLoss | None
    baseline: tuple[int, float] | None
    """Of an n-gram model: its order, and nats per token."""

    def record(self) -> dict[str, Any]:
        """Return it for a script."""
        record = evaluation_record(self.evaluation)
        if self.positions is not None:
            record["by_position"] = {"nats": self.positions.nats.tolist(), "tokens": self.positions.tokens.tolist()}
        if self.baseline is not None:
            order, nats = self.baseline
            record["baseline"] = {"order": order, "smoothing": "kneser-ney", "nats_per_token": nats}
        return record


def measure(run: "Run", file: Path, reading: Reading, *, last: bool = False) -> Measured:
    """Measure how well a run predicts a file.

    Args:
        run: The run.
        file: The text.
        reading: How.
        last: Whether to take the last weights, not the best that were measured.

    Raises:
        InputError: The text, the run or an option can't be used.
    """
    dynamic = reading.dynamic_evaluation
    baseline = None if reading.ngram is None else NGramBaseline(reading.ngram)
    tokenizer = run.tokenizer
    tokens = read_tokens(file, tokenizer)
    cache = reading.neural_cache(len(tokens))
    eos_id = tokenizer.eos_id
    units: dict[str, Any] = {
        "characters": tokenizer.characters_of(tokens),
        "bytes": file.stat().st_size if eos_id is None else tokenizer.bytes_of(tokens),
        "unknown_id": tokenizer.unknown_id,
        "eos_id": eos_id,
    }
    model = run.load_model(last=last)
    positions = counted = None
    cold = None if reading.cold is None else min(reading.cold, max(len(tokens), 1))  # one window holds all of it
    with under_way(f"reading {len(tokens):,} {UNITS[tokenizer.level]}"):
        if reading.by_position:
            positions = loss_by_position(model, tokens, eos_id=eos_id, cold=cold)
        if dynamic is None and cache is None:
            evaluation = evaluate(model, tokens, cold=cold, precision=reading.precision, **units)
        else:
            training = run.corpus().train if dynamic is not None and dynamic.rule == "rms" else None
            evaluation = evaluate_adaptively(model, tokens, dynamic=dynamic, cache=cache, training=training, **units)
        if baseline is not None:
            counted = baseline.fit(run.corpus().train, tokenizer.vocabulary_size)
    before = tokens if eos_id is None else np.append(eos_id, tokens)
    return Measured(evaluation, positions, (counted.order, counted.nats_per_token(before)) if counted else None)


def print_measured(measured: Measured, title: str) -> None:
    """Print it for a reader."""
    rows = evaluation_rows(measured.evaluation)
    if measured.baseline is not None:
        order, nats = measured.baseline
        rows.append((f"{order}-gram model", f"{nats:.4f} nats per token (Kneser–Ney, the run's training text)"))
    results().print(Facts(title, rows))
    if measured.positions is not None:
        results().print()
        results().print(Facts("loss by position: tokens since a fresh state, nats", position_rows(measured.positions)))


def position_rows(positions: PositionLoss) -> list[Row]:
    """Return the loss by position, in ranges that double.

    Example:
        >>> import numpy as np
        >>> position_rows(PositionLoss(np.array([4.0, 2.0, 1.0, 2.0]), np.array([5, 5, 3, 1])))
        [('1', '4.0000'), ('2', '2.0000'), ('3–4', '1.2500')]
    """
    rows, begin, width = [], 0, 1
    while begin < len(positions.nats):
        end = min(begin + width, len(positions.nats))
        mean = np.average(positions.nats[begin:end], weights=positions.tokens[begin:end])
        rows.append((f"{begin + 1:,}" if end == begin + 1 else f"{begin + 1:,}–{end:,}", f"{mean:.4f}"))
        begin, width = end, end
    return rows
