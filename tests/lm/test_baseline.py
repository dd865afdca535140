"""The n-gram baseline is a proper distribution, and the one its formula says."""

import math

import numpy as np
import pytest

from throughtime import InputError
from throughtime.lm import NGramBaseline

TOKENS = np.random.default_rng(0).choice(5, size=400, p=[0.4, 0.3, 0.2, 0.05, 0.05])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(order):
    baseline = NGramBaseline(order).fit(TOKENS, vocabulary_size=7)  # two tokens are never seen
    for context in ([0, 1, 0, 2], [4, 4, 4, 4], [6, 6, 6, 6], [3]):
        p = [baseline.probabilities(np.array([*context, w]))[-1] for w in range(7)]
        assert sum(p) == pytest.approx(1)
        assert min(p) > 0


def slowly(tokens: list[int], order: int, size: int, context: tuple[int, ...], w: int) -> float:
    """The formula of the module, counted by hand."""
    if order == 0:
        return 1 / size
    context = context[len(context) - order + 1 :] if order > 1 else ()
    follows = [
        tokens[i + order - 1] for i in range(len(tokens) - order + 1) if tuple(tokens[i : i + order - 1]) == context
    ]
    shorter = slowly(tokens, order - 1, size, context, w)
    if not follows:
        return shorter
    return (follows.count(w) + len(set(follows)) * shorter) / (len(follows) + len(set(follows)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_witten_bell(order):
    train, test = TOKENS[:60], TOKENS[60:90]
    p = NGramBaseline(order).fit(train, vocabulary_size=5).probabilities(test)
    for place in range(1, len(test)):
        context = tuple(test[max(place - order + 1, 0) : place].tolist())
        reach = min(order, place + 1)
        assert p[place - 1] == pytest.approx(slowly(train.tolist(), reach, 5, context, int(test[place])))


def test_longer_contexts_help_where_there_is_structure():
    tokens = np.tile([0, 1, 0, 2, 0, 3], 200)
    nats = [NGramBaseline(order).fit(tokens, 4).nats_per_token(tokens) for order in (1, 2, 3)]
    assert nats[0] > nats[1] > nats[2]
    assert nats[0] == pytest.approx(-(0.5 * math.log(0.5) + 0.5 * math.log(1 / 6)), rel=0.01)


def test_what_cant_be_counted():
    with pytest.raises(InputError, match="order 0; expected at least 1"):
        NGramBaseline(0)
    with pytest.raises(InputError, match="5-grams over 70000 tokens don't fit"):
        NGramBaseline(5).fit(TOKENS, 70_000)
