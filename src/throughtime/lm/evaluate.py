"""How well a model predicts a text: in nats, bits and perplexity."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from throughtime.errors import InputError

_EXACT = 250_000  # tokens up to which one stream carries its state through the whole text
_WARM_UP = 512  # tokens that each of several streams reads before those it is scored on


@dataclass(frozen=True)
class Evaluation:
    """The loss over a text, every token predicted with carried state.

    Attributes:
        nats_per_token: Mean of −ln p(token | what came before).
        bits_per_character: The same in bits, for each Unicode character.
        bits_per_byte: The same in bits, for each byte of UTF-8: comparable across levels.
        perplexity: exp(nats_per_token).
        tokens: How many tokens were predicted: all but the first.
        unknown: How many of them were unknown to the model.
    """

    nats_per_token: float
    bits_per_character: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    unknown: int = 0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: NDArray[np.integer],
    *,
    characters: int | None = None,
    bytes: int | None = None,
    unknown_id: int | None = None,
    window: int = 512,
) -> Evaluation:
    """Score a whole text with carried state.

    Up to 250,000 tokens, one stream reads the text from its first token to its last. A longer one is cut in streams that
    are read side by side; each first reads the 512 tokens before its own, so that every token is predicted with at least
    that much context.

    Args:
        model: `model(ids (T, B), state) -> (logits (T, B, V), state)`.
        tokens: Ids (N,), N ≥ 2.
        characters: How many characters the N tokens stand for; N if not given.
        bytes: How many bytes; N if not given.
        unknown_id: The id that is counted as unknown.
        window: Steps in one call of the model.
    """
    count = len(tokens) - 1
    if count < 1:
        raise InputError(f"{len(tokens)} tokens to evaluate on; at least 2 are needed, one to read and one to predict")
    was_training = model.training
    model.eval()
    nats = _total_nats(model, tokens, window) / count
    model.train(was_training)
    per_token = nats / math.log(2)
    return Evaluation(
        nats_per_token=nats,
        bits_per_character=per_token * (count + 1) / (characters or count + 1),
        bits_per_byte=per_token * (count + 1) / (bytes or count + 1),
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        tokens=count,
        unknown=0 if unknown_id is None else int(np.count_nonzero(tokens[1:] == unknown_id)),
    )


def _total_nats(model: nn.Module, tokens: NDArray[np.integer], window: int) -> float:
    device = next(model.parameters()).device
    count = len(tokens) - 1
    streams = 1 if count <= _EXACT else min(64, -(-count // (_EXACT // 4)))
    stride = -(-count // streams)
    warm_up = 0 if streams == 1 else _WARM_UP
    starts = np.arange(streams) * stride
    total, state = 0.0, None
    for begin in (*range(-warm_up, 0, window), *range(0, stride, window)):
        end = min(begin + window, 0 if begin < 0 else stride)
        places = starts + np.arange(begin, end)[:, None]  # (T, streams)
        inside = places.clip(0, count - 1)
        ids = torch.from_numpy(tokens[inside].astype(np.int64)).to(device)
        if begin == 0 and state is not None:
            for tensor in state:  # before the first stream there is nothing to have read
                tensor[:, 0] = 0
        logits, state = model(ids, state)
        if begin >= 0:
            targets = np.where(places < count, tokens[inside + 1].astype(np.int64), -100)
            targets = torch.from_numpy(targets).to(device).flatten()
            total += cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum").item()
    return total
