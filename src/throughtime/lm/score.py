"""Scores of single lines, and lists of hypotheses re-ranked by them, as speech recognition and translation want it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError
from throughtime.lm.encoding import encoder_of
from throughtime.lm.evaluation import SequenceScores, score_sequences
from throughtime.lm.model import LanguageModel
from throughtime.lm.reading import check_file, read_texts
from throughtime.lm.tokenizer import Tokenizer, line_end_ids


def read_lines(path: str | Path, tokenizer: Tokenizer) -> list[str]:
    r"""Return all lines of a file, empty ones too, without their ends: "\n" or "\r\n", or "\r" where there is no other.

    Raises:
        InputError: The file is missing, empty, unreadable, binary or not UTF-8.
    """
    path = Path(path)
    check_file(path)
    text = "".join(read_texts(path, tokenizer.level))
    lines = text.split("\n" if "\n" in text else "\r")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def score_lines(model: LanguageModel, tokenizer: Tokenizer, lines: Sequence[str]) -> SequenceScores:
    r"""Return −ln p of each line, its end included, every one read from a fresh state.

    A run that was trained on one stream of text reads a line end before each line, and is scored on the one after it: the one
    that most lines of its text have, "\r\n" if need be.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        lines: Without line ends. At level "byte", each byte is given as the character of its number.

    Raises:
        InputError: The model knows no line end, or one stands in a line.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=257, hidden_size=8))
        >>> score_lines(model, ByteTokenizer("line"), ["to be", "or not"]).nats.shape
        (2,)
    """
    encoder = encoder_of(tokenizer)
    unknown_id = tokenizer.unknown_id
    if tokenizer.eos_id is not None:
        ids = encoder.encode_lines(list(lines))
        return score_sequences(model, ids, tokenizer.eos_id, unknown_id=unknown_id)
    end = line_end_ids(tokenizer)
    if not end:
        raise InputError("this run knows no line end, so it can't score lines; train one with --mode sentence")
    pieces = []
    for number, line in enumerate(lines, start=1):
        pieces += [encoder.feed(line), encoder.end(), end]
        if end[-1] in pieces[-3]:
            raise InputError(f"line {number} holds a {tokenizer.line_end!r}, which ends a line of this run's text")
    ids = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)
    return score_sequences(model, ids, end[-1], unknown_id=unknown_id, end_tokens=len(end))


@dataclass(frozen=True)
class Hypothesis:
    """A line of an n-best list.

    Attributes:
        key: What it is a hypothesis for.
        score: Its score, higher is better.
        text: The hypothesis.
    """

    key: str
    score: float
    text: str


def parse_hypotheses(lines: Sequence[str], source: str) -> list[Hypothesis]:
    """Read lines of `KEY<tab>TEXT` or `KEY<tab>SCORE<tab>TEXT`; without a score it is 0.

    Raises:
        InputError: A line has no tab, or its score is no finite number.
    """
    hypotheses = []
    for number, line in enumerate(lines, start=1):
        key, *rest = line.split("\t", 2)
        if not rest:
            raise InputError(f"{source}, line {number}: no tab; expected KEY<tab>TEXT or KEY<tab>SCORE<tab>TEXT")
        try:
            score = float(rest[0]) if len(rest) == 2 else 0.0
        except ValueError as error:
            raise InputError(f"{source}, line {number}: score {rest[0]!r}; expected a number") from error
        if not math.isfinite(score):
            raise InputError(f"{source}, line {number}: score {rest[0]!r}; expected a finite number, to add ln p to")
        hypotheses.append(Hypothesis(key, score, rest[-1]))
    return hypotheses


def rerank(
    hypotheses: Sequence[Hypothesis], nats: NDArray[np.floating], weight: float = 1.0
) -> dict[str, list[Hypothesis]]:
    """Return the hypotheses for each key, best first, with `score + weight · ln p` as their score.

    Raises:
        InputError: The weight is no finite number.

    Example:
        >>> import numpy as np
        >>> listed = [Hypothesis("a", -1.0, "two sea"), Hypothesis("a", -1.5, "to see")]
        >>> [h.text for h in rerank(listed, np.array([5.0, 3.0]))["a"]]
        ['to see', 'two sea']
    """
    check_weight(weight)
    ranked: dict[str, list[Hypothesis]] = {}
    for hypothesis, lost in zip(hypotheses, nats, strict=True):
        total = replace(hypothesis, score=hypothesis.score - weight * float(lost))
        ranked.setdefault(hypothesis.key, []).append(total)
    return {key: sorted(found, key=lambda hypothesis: -hypothesis.score) for key, found in ranked.items()}


def check_weight(weight: float) -> None:
    """Raise unless the weight of ln p beside a hypothesis's own score is a finite number."""
    if not abs(weight) <= 1e100:
        raise InputError(f"--weight {weight}: expected a finite number, at most 1e100")
