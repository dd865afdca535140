"""Truncated backpropagation through time: a long sequence as parallel streams, read window by window.

The sequence is cut in B contiguous streams; a step reads the next T positions of each. The state is carried from window to
window, so that the forward pass sees the whole past, but detached, so that the backward pass stops at the window's edge
(Williams & Peng, 1990).
"""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from throughtime.errors import FieldError, InputError


def detach(state: Any) -> Any:
    """Cut a state, a tensor or nested tuples of them, off the graph that made it."""
    if isinstance(state, Tensor):
        return state.detach()
    return None if state is None else tuple(detach(part) for part in state)


class Tokens(Protocol):
    """Token ids of which pieces are taken: an array, or what is in a file."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, place: slice, /) -> NDArray[np.integer]:
        """Return the ids of a slice."""
        ...


class Streams:
    """A sequence as B contiguous streams, read T positions at a time.

    Args:
        tokens: The sequence (N,), possibly in a file.
        batch: B.
        window: T.

    Raises:
        InputError: The sequence is too short for one window.

    Example:
        >>> import numpy as np
        >>> streams = Streams(np.arange(9), batch=2, window=2)
        >>> inputs, targets = streams.window_at(1)
        >>> inputs.tolist(), targets.tolist()  # (T, B): stream 0 reads 0 1 2 3, stream 1 reads 4 5 6 7
        ([[2, 6], [3, 7]], [[3, 7], [4, 8]])
    """

    def __init__(self, tokens: Tokens, batch: int, window: int) -> None:
        for field, value in (("batch", batch), ("window", window)):
            if value < 1:
                raise FieldError(field, value, "a whole number, at least 1")
        needed = batch * window + 1
        if len(tokens) < needed:
            raise InputError(
                f"{len(tokens):,} tokens to train on, but a batch of {batch} windows of {window} steps needs at least "
                f"{needed:,}; give more text, or lower the batch or the window"
            )
        self.batch = batch
        self.window = window
        self._tokens = tokens
        self._length = (len(tokens) - 1) // batch

    def __len__(self) -> int:
        """How many whole windows an epoch has."""
        return self._length // self.window

    def window_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (T, B) int64, of a step counted from the start of training."""
        begin = (step % len(self)) * self.window
        starts = range(begin, begin + self.batch * self._length, self._length)
        rows = [self._tokens[start : start + self.window + 1] for start in starts]
        ids = torch.from_numpy(np.stack(rows, axis=1).astype(np.int64))
        return ids[:-1], ids[1:]

    def begins_epoch(self, step: int) -> bool:
        """Return whether the streams start anew at a step, so that the state must too."""
        return step % len(self) == 0
