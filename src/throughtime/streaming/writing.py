"""A stream that writes: each token is chosen from its logits, and read, without coming back to Python."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError, unknown_name
from throughtime.kernels import native
from throughtime.streaming.engine import Stream

_OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.0,
    "min_p": 0.0,
    "typical_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram": 0,
    "greedy": False,
}


class NoNumberError(InputError):
    """A logit is no number.

    Attributes:
        tokens: Those that were written before.
    """

    def __init__(self, tokens: NDArray[np.int64]) -> None:
        super().__init__("the model's output is no number (NaN): its weights are no good; train it anew")
        self.tokens = tokens


class Writer:
    """One stream of token ids to logits, and how the next token is chosen from them.

    Args:
        stream: A single stream that reads token ids, with an output for each. What it reads from now on goes through the writer.
        end: The token that ends a text, which isn't written; `None` where there is none.
        limits: `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `repetition_penalty`, `no_repeat_ngram` and `greedy`, as in
            `throughtime.lm.Sampling`; `None` is off.

    Raises:
        InputError: The stream can't write, or a limit is unknown or out of its range.

    Example:
        >>> import numpy as np, torch, throughtime
        >>> layer = throughtime.GRU(30, 16)
        >>> model = torch.nn.Sequential(layer, torch.nn.Linear(16, 30))
        >>> writer = Writer(throughtime.stream(model, ids=True), end=None, temperature=0.8, top_k=5)
        >>> writer.read([3, 1, 4])
        >>> writer.write(np.random.default_rng(0).random(20)).shape
        (20,)
    """

    def __init__(self, stream: Stream, end: int | None, **limits: Any) -> None:
        if stream.streams != 1 or not stream.reads_ids:
            raise InputError(f"{stream!r} can't write; expected one stream that reads token ids")
        if stream.output_size != stream._packed.vocabulary_size:
            raise InputError(f"{stream!r} can't write; expected an output for each token id")
        for name in limits:
            if name not in _OFF:
                raise unknown_name("limit", name, _OFF)
        given = _OFF | {name: value for name, value in limits.items() if value is not None}
        try:
            self._choice = native.module.Choice(stream.output_size, **given)
        except ValueError as error:
            raise InputError(str(error)) from None
        self._stream = stream
        self._end = -1 if end is None else end
        self._lock = threading.Lock()  # the choice is read and written while the GIL is free
        self._allowed = np.zeros(stream.output_size, np.bool_)

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens, at least one, before any is written."""
        ids = self._stream._array(tokens)
        with self._lock:
            self._choice.take(self._stream.feed(ids, last=True))
            self._choice.see(ids)

    def write(self, chances: NDArray[np.float64], forbidden: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Write as many tokens as there are chances, fewer where the text ends: at its end token, or where none is left.

        Args:
            chances: Random numbers in [0, 1), one for each token.
            forbidden: Which tokens (V,) aren't chosen.

        Raises:
            NoNumberError: A logit is no number.
            InputError: `forbidden` has another shape or dtype.
        """
        mask = self._allowed if forbidden is None else np.ascontiguousarray(forbidden)
        if mask.shape != self._allowed.shape or mask.dtype != np.bool_:
            raise InputError(f"forbidden is {mask.dtype} {list(mask.shape)}; expected bool {list(self._allowed.shape)}")
        chances = np.ascontiguousarray(chances, np.float64)
        tokens = np.empty(len(chances), np.int64)
        with self._lock:
            self._choice.see(tokens[:0], len(tokens))
            written, is_no_number = self._stream._engine.write(self._choice, chances, mask, self._end, tokens)
        if is_no_number:
            raise NoNumberError(tokens[:written])
        return tokens[:written]
