"""The n-gram baseline is a proper distribution, and the one its formula says."""

import math
from collections import Counter

import numpy as np
import pytest

from throughtime import InputError
from throughtime.lm import NGramBaseline

TOKENS = np.random.default_rng(0).choice(5, size=400, p=[0.4, 0.3, 0.2, 0.05, 0.05])


SMOOTHINGS = ("kneser-ney", "witten-bell")


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(order, smoothing):
    baseline = NGramBaseline(order, smoothing).fit(TOKENS, vocabulary_size=7)  # two tokens are never seen
    for context in ([0, 1, 0, 2], [4, 4, 4, 4], [6, 6, 6, 6], [3]):
        p = [baseline.probabilities(np.array([*context, w]))[-1] for w in range(7)]
        assert sum(p) == pytest.approx(1)
        assert min(p) > 0


def witten_bell(tokens: list[int], order: int, size: int, context: tuple[int, ...], w: int) -> float:
    """The formula of the module, counted by hand."""
    if order == 0:
        return 1 / size
    context = context[len(context) - order + 1 :] if order > 1 else ()
    follows = [
        tokens[i + order - 1] for i in range(len(tokens) - order + 1) if tuple(tokens[i : i + order - 1]) == context
    ]
    shorter = witten_bell(tokens, order - 1, size, context, w)
    if not follows:
        return shorter
    return (follows.count(w) + len(set(follows)) * shorter) / (len(follows) + len(set(follows)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_witten_bell(order):
    train, test = TOKENS[:60], TOKENS[60:90]
    p = NGramBaseline(order, "witten-bell").fit(train, vocabulary_size=5).probabilities(test)
    for place in range(1, len(test)):
        context = tuple(test[max(place - order + 1, 0) : place].tolist())
        reach = min(order, place + 1)
        assert p[place - 1] == pytest.approx(witten_bell(train.tolist(), reach, 5, context, int(test[place])))


def discounts(counts: list[int]) -> list[float]:
    n = [counts.count(k) for k in range(5)]
    if not all(n[1:]):
        return [0, 0.5, 1, 1.5]
    y = n[1] / (n[1] + 2 * n[2])
    found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    return [0, *found] if min(found) > 0 else [0, 0.5, 1, 1.5]


def kneser_ney(tokens: list[int], order: int, highest: int, size: int, context: tuple[int, ...], w: int) -> float:
    """The formula of the module, counted by hand."""
    if order == 0:
        return 1 / size
    context = context[len(context) - order + 1 :] if order > 1 else ()
    counts = Counter(zip(*(tokens[k:] for k in range(order)), strict=False))
    if order < highest:
        longer = set(zip(*(tokens[k:] for k in range(order + 1)), strict=False))
        counts = {gram: sum(other[1:] == gram for other in longer) for gram in counts}
    taken = discounts(list(counts.values()))
    after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == context}
    shorter = kneser_ney(tokens, order - 1, highest, size, context, w)
    if not sum(after.values()):
        return shorter
    left = sum(taken[min(c, 3)] for c in after.values())
    return (max(after.get(w, 0) - taken[min(after.get(w, 0), 3)], 0) + left * shorter) / sum(after.values())


@pytest.mark.parametrize(("length", "tokens"), [(60, 5), (400, 5), (400, 40)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_modified_kneser_ney(order, length, tokens):
    drawn = (np.random.default_rng(1).random(length + 20) ** 3 * tokens).astype(int)
    train, test = drawn[:length], drawn[length:]
    p = NGramBaseline(order).fit(train, vocabulary_size=tokens + 1).probabilities(test)
    for place in range(1, len(test)):
        context = tuple(test[max(place - order + 1, 0) : place].tolist())
        reach = min(order, place + 1)
        by_hand = kneser_ney(train.tolist(), reach, order, tokens + 1, context, int(test[place]))
        assert p[place - 1] == pytest.approx(by_hand)


def test_a_large_vocabulary_and_a_high_order_fit():
    tokens = np.random.default_rng(0).integers(0, 70_000, 1000)
    for smoothing in SMOOTHINGS:
        assert math.isfinite(NGramBaseline(6, smoothing).fit(tokens, 70_000).nats_per_token(tokens[:50] + 1))


def test_longer_contexts_help_where_there_is_structure():
    tokens = np.tile([0, 1, 0, 2, 0, 3], 200)
    nats = [NGramBaseline(order, "witten-bell").fit(tokens, 4).nats_per_token(tokens) for order in (1, 2, 3)]
    assert nats[0] > nats[1] > nats[2]
    assert nats[0] == pytest.approx(-(0.5 * math.log(0.5) + 0.5 * math.log(1 / 6)), rel=0.01)


def test_what_cant_be_counted():
    with pytest.raises(InputError, match="order 0; expected from 1 to 20"):
        NGramBaseline(0)
    with pytest.raises(InputError, match="unknown smoothing 'kneser'; did you mean 'kneser-ney'"):
        NGramBaseline(2, "kneser")
