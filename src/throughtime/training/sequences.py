"""Sequences of their own, batched by length: each read from its start to its end, the state new for each."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from throughtime.errors import FieldError, InputError
from throughtime.training.tbptt import Tokens

IGNORED = -100  # target of a position past its sequence's end, torch's own ignore_index


class Sequences:
    """Sequences that stand one after the other, each ended by the same token, in batches of about equal length.

    What is read at a sequence's first step is the end token too. Sequences longer than a window are read window by window, with the
    state carried; rows that have ended meanwhile have length 0. Each epoch shuffles the batches, and which of the sequences of one
    length meet in a batch.

    Args:
        tokens: The sequences (N,), possibly in a file; the last of the tokens is `end`.
        end: The token that ends a sequence.
        batch: B, sequences side by side.
        window: T, most steps in one window.
        seed: Of the shuffling.
        shuffle: Whether to shuffle; without, the batches come from the shortest to the longest.

    Raises:
        InputError: There is no sequence, or a size is below 1.

    Example:
        >>> import numpy as np
        >>> sequences = Sequences(np.array([5, 6, 0, 7, 0]), end=0, batch=2, window=10)
        >>> inputs, targets, lengths = sequences.window_at(0)
        >>> inputs.T.tolist(), targets.T.tolist(), lengths.tolist()
        ([[0, 7, 0], [0, 5, 6]], [[7, 0, -100], [5, 6, 0]], [2, 3])
    """

    def __init__(self, tokens: Tokens, end: int, batch: int, window: int, seed: int = 0, shuffle: bool = True) -> None:
        for field, value in (("batch", batch), ("window", window)):
            if value < 1:
                raise FieldError(field, value, "a whole number, at least 1")
        self.batch = batch
        self.window = window
        self._tokens = tokens
        self._end = end
        self._seed = seed
        self._shuffle = shuffle
        ends = np.flatnonzero(np.asarray(tokens) == end) + 1
        if not len(ends) or ends[-1] != len(tokens):
            raise InputError(
                f"{len(tokens):,} tokens without an end-of-sequence token at their end; expected sequences"
            )
        self._starts = np.concatenate([[0], ends[:-1]])
        self._lengths = ends - self._starts
        longest = np.sort(self._lengths)[np.minimum(np.arange(batch - 1, len(ends) + batch - 1, batch), len(ends) - 1)]
        self._windows = -(-longest // window)  # of each batch, the batches in order of length
        self._epoch = -1
        self._begin_epoch(0)

    def __len__(self) -> int:
        """How many windows an epoch has."""
        return int(self._windows.sum())

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return len(self._lengths)

    def window_at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and targets, each (T, B) int64, and lengths (B,), of a step counted from the start of training.

        Targets past a sequence's end are −100.
        """
        begin = self._place(step)[1]
        rows = self.rows_at(step)
        lengths = np.clip(self._lengths[rows] - begin, 0, self.window)
        inputs = np.full((lengths.max(), len(rows)), self._end, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row, (start, length) in enumerate(zip(self._starts[rows] + begin, lengths, strict=True)):
            if length:  # before a sequence's first token stands the end of another; before the first of all, nothing
                read = self._tokens[max(start - 1, 0) : start + length]
                targets[:length, row] = read[-length:]
                inputs[length + 1 - len(read) : length, row] = read[:-1]
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(lengths)

    def rows_at(self, step: int) -> NDArray[np.int64]:
        """Return which sequences, counted from 0, a step's rows are."""
        batch = self._place(step)[0]
        return self._order[batch * self.batch : (batch + 1) * self.batch]

    def begins_epoch(self, step: int) -> bool:
        """Return whether the sequences start at a step, so that the state must be new."""
        return self._place(step)[1] == 0

    def _place(self, step: int) -> tuple[int, int]:
        """Return a step's batch, and the position in its sequences at which it begins."""
        epoch, step = divmod(step, len(self))
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        turn = int(np.searchsorted(self._after, step, side="right"))
        batch = int(self._turns[turn])
        return batch, (step - int(self._after[turn] - self._windows[batch])) * self.window

    def _begin_epoch(self, epoch: int) -> None:
        chooser = np.random.default_rng([self._seed, epoch])
        count, batches = len(self._lengths), len(self._windows)
        ties = chooser.random(count) if self._shuffle else np.arange(count)
        self._order = np.lexsort((ties, self._lengths))
        self._turns = chooser.permutation(batches) if self._shuffle else np.arange(batches)
        self._after = np.cumsum(self._windows[self._turns])
        self._epoch = epoch
