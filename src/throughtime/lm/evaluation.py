"""How well a model predicts a text: in nats, bits and perplexity."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from throughtime.errors import InputError
from throughtime.lm.model import LanguageModel
from throughtime.lm.streamed import reader_of
from throughtime.training import Sequences

_EXACT = 250_000  # tokens up to which one stream carries its state through the whole text
_WARM_UP = 512  # tokens that each of several streams reads before those it is scored on
_BATCH = 64  # sequences scored side by side
_MOST_LOGITS = 1 << 25  # numbers held at a time
_VALIDATED = 65_536  # tokens that a model is measured on while it is trained
_VALIDATION_STREAMS = 32
CARRIED, FRESH = "carried state", "each sequence from a fresh state"


@dataclass(frozen=True)
class Evaluation:
    """The loss over a text.

    Of a stream, every token but the first is predicted; of sequences every token, their ends included.

    Attributes:
        nats_per_token: Mean of −ln p(token | what came before).
        bits_per_character: The same in bits, for each Unicode character.
        bits_per_byte: The same in bits, for each byte of UTF-8: comparable across levels.
        perplexity: exp(nats_per_token).
        tokens: How many tokens were predicted.
        unknown: How many of them were unknown to the model.
        nats_per_token_without_unknown: Of the others alone; `None` where nothing can be unknown, or all is.
        perplexity_without_unknown: Likewise.
        sequences: How many sequences there were; `None` of a stream.
        perplexity_without_eos: Of the tokens that don't end a sequence alone; `None` of a stream.
        method: With which state the text was read, and what was adapted to it, in words.
    """

    nats_per_token: float
    bits_per_character: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    unknown: int = 0
    nats_per_token_without_unknown: float | None = None
    perplexity_without_unknown: float | None = None
    sequences: int | None = None
    perplexity_without_eos: float | None = None
    method: str = CARRIED


class PositionLoss(NamedTuple):
    """The loss by the number of tokens since a fresh state.

    Attributes:
        nats: Mean −ln p of the first token after it, of the second, …, (P,).
        tokens: How many tokens each is the mean of, (P,).
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]


class SequenceScores(NamedTuple):
    """−ln p of sequences.

    Attributes:
        nats: Of each sequence, its end included, (N,).
        eos_nats: Of each sequence's end alone, (N,).
        unknown_nats: Of its unknown tokens alone, (N,).
        tokens: How many tokens each has, its end included, (N,).
        unknown: How many of them are unknown, (N,).
    """

    nats: NDArray[np.float64]
    eos_nats: NDArray[np.float64]
    unknown_nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    unknown: NDArray[np.int64]


class Lost(NamedTuple):
    """−ln p of a text, and of parts of it.

    Attributes:
        nats: Of all that was predicted.
        unknown_nats: Of the unknown tokens among it.
        eos_nats: Of the ends of sequences among it.
    """

    nats: float
    unknown_nats: float
    eos_nats: float = 0.0

    @classmethod
    def of(
        cls, nats: NDArray[np.floating], targets: NDArray[np.integer], unknown_id: int | None, eos_id: int | None
    ) -> "Lost":
        """Return the sums of what was lost at each token."""
        unknown, ends = (
            0.0 if which is None else float(nats[targets == which].sum()) for which in (unknown_id, eos_id)
        )
        return cls(float(nats.sum()), unknown, ends)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    *,
    characters: int | None = None,
    bytes: int | None = None,
    unknown_id: int | None = None,
    eos_id: int | None = None,
    window: int = 512,
    cold: int | None = None,
    precision: str = "float32",
) -> Evaluation:
    """Score a whole text: a stream with carried state or in cold windows, or sequences one by one.

    Up to 250,000 tokens, one stream reads the text from its first token to its last. A longer one is cut in streams that
    are read side by side; each first reads the 512 tokens before its own, so that every token is predicted with at least
    that much context. In cold windows every window is read from a fresh state, as models without a carried state are measured.

    Args:
        model: The language model.
        tokens: Ids (N,), N ≥ 2; or sequences, each ended by `eos_id`.
        characters: How many characters the N tokens stand for; N if not given.
        bytes: How many bytes; N if not given.
        unknown_id: The id that is counted as unknown.
        eos_id: The id that ends a sequence; `None` where the text is one stream.
        window: Most steps in one call of the model.
        cold: Tokens in a cold window, of a stream; `None` carries the state.
        precision: What products multiply: "float32", or as streams read the text, "bfloat16" or "int8"; see `throughtime.stream`.

    Raises:
        InputError: There are too few tokens, or `cold` is below 1 or given with sequences, or no stream has the precision.
    """
    _check_readable(tokens, eos_id, cold)
    was_training = model.training
    model.eval()
    method = CARRIED
    if eos_id is not None:
        scores = score_sequences(model, tokens, eos_id, window, unknown_id=unknown_id, precision=precision)
        method = FRESH
        lost = Lost(*(float(part.sum()) for part in (scores.nats, scores.unknown_nats, scores.eos_nats)))
    elif cold is not None:
        lost = Lost.of(cold_nats(model, tokens, cold, precision), tokens[1:], unknown_id, eos_id)
        method = f"cold windows of {cold:,} tokens"
    else:
        streams = 1 if len(tokens) - 1 <= _EXACT else min(64, -(-(len(tokens) - 1) // (_EXACT // 4)))
        warm_up = 0 if streams == 1 else _WARM_UP
        lost = _lost_in_streams(model, tokens, window, streams, warm_up, unknown_id, precision=precision)
    if precision != "float32":
        method = f"{method}, {precision}"
    model.train(was_training)
    return summarise(lost, tokens, method, characters=characters, bytes=bytes, unknown_id=unknown_id, eos_id=eos_id)


def summarise(
    lost: Lost,
    tokens: NDArray[np.integer],
    method: str,
    *,
    characters: int | None = None,
    bytes: int | None = None,
    unknown_id: int | None = None,
    eos_id: int | None = None,
) -> Evaluation:
    """Return what −ln p of a text comes to in every unit.

    Args:
        lost: −ln p of what was predicted.
        tokens: The text (N,), of which a stream's first token wasn't predicted.
        method: How it was read.
        characters: How many characters the N tokens stand for; N if not given.
        bytes: How many bytes; N if not given.
        unknown_id: The id that is counted as unknown.
        eos_id: The id that ends a sequence; `None` where the text is one stream.
    """
    predicted = tokens[1:] if eos_id is None else tokens
    share = len(predicted) / len(tokens)
    sequences = None if eos_id is None else int(np.count_nonzero(predicted == eos_id))
    unknown = 0 if unknown_id is None else int(np.count_nonzero(predicted == unknown_id))
    nats, known = lost.nats, len(predicted) - unknown
    of_known = (nats - lost.unknown_nats) / known if known and unknown_id is not None else None
    bits = nats / math.log(2)
    return Evaluation(
        nats_per_token=nats / len(predicted),
        bits_per_character=bits / ((characters or len(tokens)) * share),
        bits_per_byte=bits / ((bytes or len(tokens)) * share),
        perplexity=_perplexity(nats, len(predicted)),
        tokens=len(predicted),
        unknown=unknown,
        nats_per_token_without_unknown=of_known,
        perplexity_without_unknown=None if of_known is None else _perplexity(of_known, 1),
        sequences=sequences,
        perplexity_without_eos=None
        if sequences is None
        else _perplexity(nats - lost.eos_nats, len(tokens) - sequences),
        method=method,
    )


@torch.no_grad()
def loss_by_position(
    model: LanguageModel, tokens: NDArray[np.integer], *, eos_id: int | None = None, cold: int | None = None
) -> PositionLoss:
    """Return the loss by position since the start of a cold window, or of a sequence: what context is worth to a model.

    Args:
        model: The language model.
        tokens: Ids (N,), N ≥ 2; or sequences, each ended by `eos_id`.
        eos_id: The id that ends a sequence; `None` where the text is one stream, which then needs `cold`.
        cold: Tokens in a cold window.

    Raises:
        InputError: There are too few tokens, or a stream without `cold`.
    """
    _check_readable(tokens, eos_id, cold)
    was_training = model.training
    model.eval()
    if eos_id is None:
        if cold is None:
            raise InputError("--by-position counts from a fresh state; add --cold W, for example --cold 64")
        nats = cold_nats(model, tokens, cold)
        nats = np.pad(nats, (0, -len(nats) % cold), constant_values=np.nan).reshape(-1, cold)
        counts = np.count_nonzero(~np.isnan(nats), axis=0)
        totals = np.nansum(nats, axis=0)
    else:
        longest = int(np.diff(np.flatnonzero(np.asarray(tokens) == eos_id), prepend=-1).max(initial=0))
        totals, counts = np.zeros(longest), np.zeros(longest, dtype=np.int64)
        for begin, _, targets, lost in _sequence_windows(model, tokens, eos_id, 512):
            steps = slice(begin, begin + len(targets))
            totals[steps] += lost.sum(1).numpy()
            counts[steps] += (targets >= 0).sum(1).numpy()
    model.train(was_training)
    seen = counts > 0
    return PositionLoss(totals[seen] / counts[seen], counts[seen])


@torch.no_grad()
def cold_nats(
    model: LanguageModel, tokens: NDArray[np.integer], window: int, precision: str = "float32"
) -> NDArray[np.float64]:
    """Return −ln p of every token but the first, (N−1,); each window of so many is read from a fresh state."""
    count = len(tokens) - 1
    rows = max(min(_BATCH, _MOST_LOGITS // (window * model.config.vocabulary_size)), 1)
    reader = reader_of(model, precision, rows)
    nats = []
    for begin in range(0, count, rows * window):
        places = np.arange(begin, begin + rows * window).reshape(rows, window).T  # (T, B)
        places = places[:, places[0] < count]
        inside = places.clip(0, count - 1)
        reader.begin()
        logits = reader.read(torch.from_numpy(tokens[inside].astype(np.int64)))
        targets = torch.from_numpy(tokens[inside + 1].astype(np.int64)).to(logits.device)
        lost = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
        nats.append(lost.double().cpu().numpy().T.ravel())
    return np.concatenate(nats)[:count]


def _check_readable(tokens: NDArray[np.integer], eos_id: int | None, cold: int | None) -> None:
    if eos_id is None and len(tokens) < 2:
        raise InputError(f"{len(tokens)} tokens to evaluate on; at least 2 are needed, one to read and one to predict")
    if cold is not None and eos_id is not None:
        raise InputError("--cold is for a stream; a run of sequences reads each one from a fresh state anyway")
    if cold is not None and cold < 1:
        raise InputError(f"--cold {cold}: expected a number of tokens, at least 1")


class _StoppedError(Exception):
    """Somebody asked for the end."""


@torch.no_grad()
def validation_loss(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    eos_id: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the mean loss over the beginning of a text, quickly: what checkpoints are compared by, no figure to report.

    Up to 65,536 tokens are read, as 32 streams that all start from a fresh state, or as sequences.

    Args:
        model: The language model.
        tokens: The text, or sequences, each ended by `eos_id`.
        eos_id: The id that ends a sequence; `None` where the text is one stream.
        should_stop: Asked between any two windows.

    Returns:
        Nats per token; `None` if it was stopped.
    """
    tokens = tokens[:_VALIDATED]
    ends = np.flatnonzero(np.asarray(tokens) == eos_id) if eos_id is not None else []
    model.eval()
    try:
        if eos_id is not None and len(ends):
            tokens = tokens[: ends[-1] + 1]
            return float(score_sequences(model, tokens, eos_id, 256, should_stop).nats.sum()) / len(tokens)
        streams = min(_VALIDATION_STREAMS, -(-len(tokens) // 64)) if eos_id is None else 1
        return _lost_in_streams(model, tokens, 256, streams, 0, None, should_stop).nats / (len(tokens) - 1)
    except _StoppedError:
        return None


@torch.no_grad()
def score_sequences(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    eos_id: int,
    window: int = 512,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    unknown_id: int | None = None,
    end_tokens: int = 1,
    precision: str = "float32",
) -> SequenceScores:
    """Return −ln p of each sequence, every one read from a fresh state.

    Args:
        model: The language model.
        tokens: The sequences one after the other, each ended by `eos_id`.
        eos_id: The id that ends a sequence, and that is read before its first token.
        window: Most steps in one call of the model.
        should_stop: Asked between any two windows; if so, an exception ends it.
        unknown_id: The id that is counted as unknown.
        end_tokens: How many tokens a sequence's end is, `eos_id` the last of them.
        precision: As of `evaluate`.
    """
    lengths = np.diff(np.flatnonzero(np.asarray(tokens) == eos_id), prepend=-1)
    nats, eos_nats, unknown_nats = np.zeros((3, len(lengths)))
    unknown = np.zeros(len(lengths), dtype=np.int64)
    for begin, rows, targets, lost in _sequence_windows(model, tokens, eos_id, window, should_stop, precision):
        places = begin + torch.arange(len(targets))[:, None]
        is_end = places >= torch.from_numpy(lengths[rows]) - end_tokens
        is_unknown = targets == (-1 if unknown_id is None else unknown_id)
        nats[rows] += lost.sum(0).numpy()
        eos_nats[rows] += torch.where(is_end, lost, 0).sum(0).numpy()  # nothing is lost beyond the end
        unknown_nats[rows] += torch.where(is_unknown, lost, 0).sum(0).numpy()
        unknown[rows] += is_unknown.sum(0).numpy()
    return SequenceScores(nats, eos_nats, unknown_nats, lengths, unknown)


def _sequence_windows(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    eos_id: int,
    window: int,
    should_stop: Callable[[], bool] = lambda: False,
    precision: str = "float32",
) -> Iterator[tuple[int, NDArray[np.int64], Tensor, Tensor]]:
    """Yield where in its sequences a window begins, which sequences they are, its targets, and −ln p of each, (T, B)."""
    window = _affordable(window, _BATCH, model.config.vocabulary_size)
    sequences = Sequences(tokens, eos_id, _BATCH, window, shuffle=False)
    reader, begin = reader_of(model, precision, _BATCH), 0
    for step in range(len(sequences)):
        if should_stop():
            raise _StoppedError
        inputs, targets, lengths = sequences.window_at(step)
        begin += window
        if sequences.begins_epoch(step):
            reader.begin()
            begin = 0
        logits = reader.read(inputs, lengths)
        lost = cross_entropy(
            logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), ignore_index=-100, reduction="none"
        )
        yield begin, sequences.rows_at(step), targets, lost.view(targets.shape).double().cpu()


def _affordable(window: int, rows: int, vocabulary_size: int) -> int:
    """Return a window, at most the one that is asked for, whose logits fit in memory."""
    return max(min(window, _MOST_LOGITS // (rows * vocabulary_size)), 1)


def _perplexity(nats: float, count: int) -> float:
    per_token = nats / count if count else math.inf
    return math.exp(per_token) if per_token < 700 else math.inf


def _lost_in_streams(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    window: int,
    streams: int,
    warm_up: int,
    unknown_id: int | None,
    should_stop: Callable[[], bool] = lambda: False,
    precision: str = "float32",
) -> Lost:
    """Return −ln p of all tokens but the first, read in streams that begin `warm_up` tokens before those they are scored on."""
    reader = reader_of(model, precision, streams)
    count = len(tokens) - 1
    stride = -(-count // streams)
    window = _affordable(window, streams, model.config.vocabulary_size)
    starts = np.arange(streams) * stride
    total = of_unknown = 0.0
    for begin in (*range(-warm_up, 0, window), *range(0, stride, window)):
        if should_stop():
            raise _StoppedError
        end = min(begin + window, 0 if begin < 0 else stride)
        places = starts + np.arange(begin, end)[:, None]  # (T, streams)
        inside = places.clip(0, count - 1)
        if begin == 0:
            reader.begin_row(0)  # before the first stream there is nothing to have read
        logits = reader.read(torch.from_numpy(tokens[inside].astype(np.int64)))
        if begin >= 0:
            targets = np.where(places < count, tokens[inside + 1].astype(np.int64), -100)
            targets = torch.from_numpy(targets).to(logits.device).flatten()
            lost = cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="none")
            total += lost.sum().item()
            of_unknown += 0.0 if unknown_id is None else lost[targets == unknown_id].sum().item()
    return Lost(total, of_unknown)
