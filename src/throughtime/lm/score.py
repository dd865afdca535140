"""Scores of single lines, and lists of hypotheses re-ranked by them, as speech recognition and translation want it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError
from throughtime.lm.encoding import encoder_of
from throughtime.lm.evaluate import SequenceScores, score_sequences
from throughtime.lm.model import LanguageModel
from throughtime.lm.reading import check_file, read_texts
from throughtime.lm.tokenizer import Tokenizer


def read_lines(path: str | Path, tokenizer: Tokenizer) -> list[str]:
    r"""Return all lines of a file, empty ones too, without their ends ("\n" or "\r\n").

    Raises:
        InputError: The file is missing, empty, unreadable, binary or not UTF-8.
    """
    path = Path(path)
    check_file(path)
    lines = "".join(read_texts(path, tokenizer.level)).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def score_lines(model: LanguageModel, tokenizer: Tokenizer, lines: Sequence[str]) -> SequenceScores:
    """Return −ln p of each line, its end included, every one read from a fresh state.

    A run that was trained on one stream of text reads a line end before each line, and is scored on the one after it.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        lines: Without line ends. At level "byte", each byte is given as the character of its number.

    Raises:
        InputError: The model knows no line end.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=257, hidden_size=8))
        >>> score_lines(model, ByteTokenizer("line"), ["to be", "or not"]).nats.shape
        (2,)
    """
    encoder = encoder_of(tokenizer)
    end = tokenizer.eos_id
    if end is not None:
        return score_sequences(model, encoder.encode_lines(list(lines)), end)
    end = _line_end(tokenizer)
    pieces = [np.concatenate([encoder.feed(line), encoder.end(), [end]]) for line in lines]
    return score_sequences(model, np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64), end)


def _line_end(tokenizer: Tokenizer) -> int:
    """Return the token of a line end."""
    ids = tokenizer.encode("\n")
    if len(ids) != 1 or ids[0] == tokenizer.unknown_id:
        raise InputError("this run knows no line end, so it can't score lines; train one with --mode sentence")
    return int(ids[0])


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
        InputError: A line has no tab, or its score is no number.
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
        hypotheses.append(Hypothesis(key, score, rest[-1]))
    return hypotheses


def rerank(
    hypotheses: Sequence[Hypothesis], nats: NDArray[np.floating], weight: float = 1.0
) -> dict[str, list[Hypothesis]]:
    """Return the hypotheses for each key, best first, with `score + weight · ln p` as their score.

    Example:
        >>> import numpy as np
        >>> listed = [Hypothesis("a", -1.0, "two sea"), Hypothesis("a", -1.5, "to see")]
        >>> [h.text for h in rerank(listed, np.array([5.0, 3.0]))["a"]]
        ['to see', 'two sea']
    """
    ranked: dict[str, list[Hypothesis]] = {}
    for hypothesis, lost in zip(hypotheses, nats, strict=True):
        total = replace(hypothesis, score=hypothesis.score - weight * float(lost))
        ranked.setdefault(hypothesis.key, []).append(total)
    return {key: sorted(found, key=lambda hypothesis: -hypothesis.score) for key, found in ranked.items()}
