"""A stream that writes: each token is chosen from its logits, and read, without coming back to Python."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError
from throughtime.kernels import native
from throughtime.streaming.engine import Stream


class Writer:
    """One stream of token ids to logits, and how the next token is chosen from them.

    Args:
        stream: A single stream that reads token ids. What it reads from now on goes through the writer.
        end: The token that ends a text, which isn't written; `None` where there is none.
        limits: `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `repetition_penalty`, `no_repeat_ngram` and `greedy`, as in
            `throughtime.lm.Sampling`; `None` is off.

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
        self._stream = stream
        self._end = -1 if end is None else end
        off = {"temperature": 1.0, "top_k": 0, "top_p": 0.0, "min_p": 0.0, "typical_p": 0.0}
        off |= {"repetition_penalty": 1.0, "no_repeat_ngram": 0, "greedy": False}
        given = off | {name: value for name, value in limits.items() if value is not None}
        self._choice = native.module.Choice(stream.output_size, *(given[name] for name in off))
        self._lock = threading.Lock()  # the choice is read and written while the GIL is free
        self._allowed = np.zeros(stream.output_size, np.bool_)

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens, at least one, before any is written."""
        ids = np.asarray(tokens, np.int64)
        with self._lock:
            logits = self._stream.feed(ids, last=True)
            self._choice.take(logits.ctypes.data)
            self._choice.see(ids.ctypes.data, len(ids), 0)

    def write(self, chances: NDArray[np.float64], forbidden: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Write as many tokens as there are chances, fewer where the text ends: at its end token, or where none is left.

        Args:
            chances: Random numbers in [0, 1), one for each token.
            forbidden: Which tokens (V,) aren't chosen.

        Raises:
            InputError: A logit is no number.
        """
        count = len(chances)
        chances = np.ascontiguousarray(chances, np.float64)
        mask = self._allowed if forbidden is None else np.ascontiguousarray(forbidden, np.bool_)
        tokens = np.empty(count, np.int64)
        addresses = chances.ctypes.data, mask.ctypes.data
        with self._lock:
            self._choice.see(0, 0, count)
            written = self._stream._engine.write(self._choice, count, *addresses, self._end, tokens.ctypes.data)
        if written < 0:
            raise InputError("the model's output is no number (NaN): its weights are no good; train it anew")
        return tokens[:written]
