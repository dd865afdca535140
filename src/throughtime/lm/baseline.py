"""n-gram models: what a language model must beat for its numbers to mean something.

Interpolated Witten–Bell smoothing (Witten & Bell, 1991; Chen & Goodman, 1999): with c counts and u the number of
distinct tokens seen after a context,

    p_n(w | context) = (c(context, w) + u(context) · p_{n−1}(w | shorter context)) / (c(context) + u(context))

down to p_0 = 1/V. Order 1 is the unigram model.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError


class _Counts(NamedTuple):
    """Counts of one order, as sorted codes: of n-grams, and of their contexts."""

    grams: NDArray[np.int64]
    gram_counts: NDArray[np.int64]
    contexts: NDArray[np.int64]
    context_counts: NDArray[np.int64]
    distinct: NDArray[np.int64]


class NGramBaseline:
    """An n-gram model over token ids.

    Args:
        order: n, at least 1; the context is the n−1 tokens before. V to the power n must fit in 63 bits.

    Example:
        >>> import numpy as np
        >>> tokens = np.array([0, 1, 2] * 50)
        >>> baseline = NGramBaseline(order=2).fit(tokens, vocabulary_size=3)
        >>> round(baseline.nats_per_token(tokens), 2)
        0.01
    """

    def __init__(self, order: int) -> None:
        if order < 1:
            raise InputError(f"an n-gram of order {order}; expected at least 1")
        self.order = order
        self.vocabulary_size = 0
        self._counts: list[_Counts] = []

    def fit(self, tokens: NDArray[np.integer], vocabulary_size: int) -> "NGramBaseline":
        """Count the n-grams of all orders up to the model's; return the model.

        Raises:
            InputError: The vocabulary is too large for the order.
        """
        if vocabulary_size**self.order >= 2**63:
            raise InputError(
                f"{self.order}-grams over {vocabulary_size} tokens don't fit in 63 bits; take a lower order"
            )
        self.vocabulary_size = vocabulary_size
        self._counts = []
        for order in range(1, self.order + 1):
            grams, gram_counts = np.unique(self._codes(tokens, order), return_counts=True)
            of_gram = grams // vocabulary_size  # the context of each n-gram, in sorted order too
            contexts, first, distinct = np.unique(of_gram, return_index=True, return_counts=True)
            context_counts = np.add.reduceat(gram_counts, first) if len(first) else first
            self._counts.append(_Counts(grams, gram_counts, contexts, context_counts, distinct))
        return self

    def probabilities(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return p(token | the tokens before) for each of (N,) but the first, which only serves as context."""
        p = np.full(len(tokens) - 1, 1 / self.vocabulary_size)
        for order, counts in enumerate(self._counts, start=1):
            skipped = max(order - 1, 1)  # the first tokens that have no context of this length
            codes = self._codes(tokens, order)[skipped - order + 1 :]
            seen = _lookup(counts.grams, counts.gram_counts, codes)
            context = codes // self.vocabulary_size
            total = _lookup(counts.contexts, counts.context_counts, context)
            distinct = _lookup(counts.contexts, counts.distinct, context)
            shorter = p[skipped - 1 :]
            known = total > 0
            p[skipped - 1 :] = np.where(known, (seen + distinct * shorter) / np.maximum(total + distinct, 1), shorter)
        return p

    def nats_per_token(self, tokens: NDArray[np.integer]) -> float:
        """Return the mean of −ln p over a text, its first token excepted."""
        return float(-np.log(self.probabilities(tokens)).mean())

    def _codes(self, tokens: NDArray[np.integer], order: int) -> NDArray[np.int64]:
        """Write each n-gram as one number in base V, its last token the lowest digit."""
        count = max(len(tokens) - order + 1, 0)
        codes = np.zeros(count, dtype=np.int64)
        for offset in range(order):
            codes *= self.vocabulary_size
            codes += tokens[offset : offset + count]
        return codes


def _lookup(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
