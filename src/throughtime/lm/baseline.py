"""n-gram models: what a language model must beat for its numbers to mean something.

Both smoothings interpolate with the shorter context, down to p_0 = 1/V:

    p_n(w | context) = share_n(context, w) + backoff_n(context) · p_{n−1}(w | shorter context)

- "kneser-ney", modified (Chen & Goodman, 1999, section 3): share = (c − D_c) / Σc and backoff = ΣD_c / Σc, sums over what
  followed the context. c is the count of an n-gram at the highest order and, below it, the number of distinct tokens before it.
  With n_k the number of n-grams of count k and Y = n₁ / (n₁ + 2n₂), D_k = k − (k + 1) Y n_{k+1} / n_k for k = 1, 2 and, from
  three on, 3; ½, 1 and 1½ where one of them can't be had.
- "witten-bell" (Witten & Bell, 1991): share = c / (Σc + u) and backoff = u / (Σc + u), with u the number of distinct tokens after
  the context.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError, unknown_name
from throughtime.training.tbptt import Tokens

LONGEST = 20  # order of an n-gram
SMOOTHINGS = ("kneser-ney", "witten-bell")
_FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])


class _Order(NamedTuple):
    """One order: of each n-gram, by its code in sorted order, what is its own; of each context, by its rank, what is left."""

    codes: NDArray[np.int64]
    share: NDArray[np.float64]
    backoff: NDArray[np.float64]


class NGramBaseline:
    """An n-gram model over token ids.

    Args:
        order: n, 1 … `LONGEST`; the context is the n−1 tokens before.
        smoothing: "kneser-ney" or "witten-bell".

    Raises:
        InputError: The order is out of range, or the smoothing unknown.

    Example:
        >>> import numpy as np
        >>> tokens = np.array([0, 1, 2] * 50)
        >>> baseline = NGramBaseline(order=2).fit(tokens, vocabulary_size=3)
        >>> round(baseline.nats_per_token(tokens), 2)
        0.02
    """

    def __init__(self, order: int, smoothing: str = "kneser-ney") -> None:
        if not 1 <= order <= LONGEST:
            raise InputError(f"an n-gram of order {order}; expected from 1 to {LONGEST}")
        if smoothing not in SMOOTHINGS:
            raise unknown_name("smoothing", smoothing, SMOOTHINGS)
        self.order = order
        self.smoothing = smoothing
        self.vocabulary_size = 0
        self._orders: list[_Order] = []

    def fit(self, tokens: Tokens, vocabulary_size: int) -> "NGramBaseline":
        """Count the n-grams of all orders up to the model's; return the model."""
        self.vocabulary_size = vocabulary_size
        counted = []
        context = np.zeros(len(tokens), dtype=np.int64)
        for order in range(1, self.order + 1):
            codes = context * vocabulary_size + tokens[order - 1 :]
            grams, first, ranks, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
            if self.smoothing == "kneser-ney" and counted:
                # each n-gram found is one distinct token before the shorter n-gram that it ends with
                shorter, _, ranks_before = counted[-1]
                counted[-1] = shorter, np.bincount(ranks_before[first + 1], minlength=len(shorter)), ranks_before
            counted.append((grams, counts, ranks))
            context = ranks[:-1]
        contexts = 1
        self._orders = []
        for grams, counts, _ in counted:
            self._orders.append(self._smoothed(grams, counts, contexts))
            contexts = len(grams)
        return self

    def _smoothed(self, grams: NDArray[np.int64], counts: NDArray[np.int64], contexts: int) -> _Order:
        of_gram = grams // self.vocabulary_size  # the rank of each n-gram's context
        total = np.bincount(of_gram, counts, contexts)
        if self.smoothing == "kneser-ney":
            taken = _discounts(counts)[np.minimum(counts, 3)]
            left = np.bincount(of_gram, taken, contexts)
        else:
            taken, left = np.zeros(len(counts)), np.bincount(of_gram, minlength=contexts).astype(float)
            total = total + left
        share = (counts - taken) / np.maximum(total[of_gram], 1)
        return _Order(grams, share, np.where(total > 0, left / np.maximum(total, 1), 1.0))

    def probabilities(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return p(token | the tokens before) for each of (N,) but the first, which only serves as context."""
        p = np.full(len(tokens), 1 / self.vocabulary_size)
        context = np.zeros(len(tokens), dtype=np.int64)
        for place, order in enumerate(self._orders):
            shorter = p[place:]
            known = context >= 0
            ranks = _rank(order.codes, np.where(known, context * self.vocabulary_size + tokens[place:], -1))
            share = np.append(order.share, 0.0)[ranks]  # rank −1 is no n-gram at all
            backoff = np.append(order.backoff, 1.0)[context]
            p[place:] = share + backoff * shorter
            context = ranks[:-1]
        return p[1:]

    def nats_per_token(self, tokens: NDArray[np.integer]) -> float:
        """Return the mean of −ln p over a text, its first token excepted."""
        return float(-np.log(self.probabilities(tokens)).mean())


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what is taken from an n-gram that was counted 0, 1, 2, and 3 times or more."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)  # n₁ … n₄
    if not n.all():
        return _FALLBACK
    k = np.arange(1, 4)
    discounts = k - (k + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
    return np.append(0.0, discounts) if (discounts > 0).all() else _FALLBACK


def _rank(sorted_codes: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where codes stand, −1 where they don't."""
    if not len(sorted_codes):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(sorted_codes, wanted), len(sorted_codes) - 1)
    return np.where(sorted_codes[place] == wanted, place, -1)
