"""What narrow weights cost and bring: a run measured in float32, bfloat16 and int8."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import throughtime
from throughtime.lm.evaluation import Evaluation, evaluate
from throughtime.lm.model import LanguageModel
from throughtime.streaming.engine import PRECISIONS
from throughtime.streaming.writing import Writer

_WRITTEN = 0.3  # seconds of sampling that a speed is taken from


class Cost(NamedTuple):
    """A precision, measured.

    Attributes:
        precision: "float32", "bfloat16" or "int8".
        evaluation: How well it predicts a text.
        lost: By what share its perplexity is above float32's.
        weights: Bytes of the packed weights; rows that tokens choose are float32 always.
        tokens_a_second: How many tokens it samples, one after the other, on one thread.
    """

    precision: str
    evaluation: Evaluation
    lost: float
    weights: int
    tokens_a_second: float


def costs(model: LanguageModel, tokens: NDArray[np.integer], **units: Any) -> Iterator[Cost]:
    """Measure each precision on a text, float32 first; `tokens` and `units` as of `evaluate`.

    Raises:
        InputError: No stream can read the model, or the text is too short.

    Example:
        >>> import numpy as np
        >>> from throughtime.lm import LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=30, hidden_size=16))
        >>> [cost.precision for cost in costs(model, np.arange(300) % 30)]
        ['float32', 'bfloat16', 'int8']
    """
    exact = None
    for precision in PRECISIONS:
        stream = throughtime.stream(model, precision=precision)
        writer = Writer(stream, end=None)
        writer.read([0])
        measured = evaluate(model, tokens, precision=precision, **units)
        exact = measured if exact is None else exact
        lost = measured.perplexity / exact.perplexity - 1
        yield Cost(precision, measured, lost, stream.memory.weights, _speed(writer))


def _speed(writer: Writer) -> float:
    """Return how many tokens are written in a second."""
    chances, count = np.random.default_rng(0).random(64), 0
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < _WRITTEN:
        count += len(writer.write(chances))
    return count / seconds
