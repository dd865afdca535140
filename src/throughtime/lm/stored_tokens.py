"""Tokens in a file, verified when it is opened and read piece by piece from then on.

They aren't memory-mapped: where somebody cuts a mapped file short, the system ends the process that reads it (SIGBUS), without a
word. A read that comes up short is an error like any other.
"""

import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from throughtime.training.files import CheckpointError, open_plain

_CHUNK = 8 << 20  # bytes


class _Opened:
    """A file that is closed when the last who reads it is gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)


class StoredTokens(NDArrayOperatorsMixin):
    """Part of a file of token ids (N,), which NumPy takes for an array; a slice reads no more than it holds.

    Args:
        path: The file.
        dtype: Of its ids.
        count: How many ids it holds.
        vocabulary_size: V; all ids are below.
        sha256: The file's digest.

    Raises:
        CheckpointError: It isn't a plain file, or not the one that was written.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int, vocabulary_size: int, sha256: str) -> None:
        self.path = path
        self.dtype = dtype
        self._begin, self._count = 0, count
        try:
            self._file = _Opened(open_plain(path, os.O_RDONLY))
        except OSError as error:
            raise CheckpointError(
                f"{path}: can't be read: {error.strerror}; delete its folder to encode anew"
            ) from error
        self._verify(vocabulary_size, sha256)

    def _verify(self, vocabulary_size: int, sha256: str) -> None:
        size = os.fstat(self._file.descriptor).st_size
        if size != self._count * self.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: {size} bytes, expected {self._count * self.dtype.itemsize}; delete its folder to encode anew"
            )
        digest, largest, per_chunk = hashlib.sha256(), 0, _CHUNK // self.dtype.itemsize
        for begin in range(0, self._count, per_chunk):
            ids = self[begin : begin + per_chunk]
            digest.update(ids.data)
            largest = max(largest, int(ids.max()))
        if digest.hexdigest() != sha256:
            raise CheckpointError(
                f"{self.path}: altered since it was encoded (its SHA-256 doesn't match); delete its folder to encode anew"
            )
        if largest >= vocabulary_size:
            raise CheckpointError(
                f"{self.path}: holds the id {largest}, but the vocabulary has {vocabulary_size}; delete its folder to encode anew"
            )

    def __len__(self) -> int:
        """How many ids there are."""
        return self._count

    def part(self, begin: int, end: int) -> "StoredTokens":
        """Return the ids from one place to another, still in the file."""
        part = object.__new__(StoredTokens)
        vars(part).update(vars(self))
        part._begin, part._count = self._begin + begin, end - begin
        return part

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (self._count,)

    def __iter__(self) -> Iterator[Any]:
        """Yield the ids."""
        return iter(self[:])

    def __getitem__(self, place: Any) -> Any:
        """Read the ids of a slice; whatever else an array can be asked for takes all of them.

        Raises:
            CheckpointError: The file was cut short meanwhile.
        """
        if not isinstance(place, slice) or place.step not in (None, 1):
            return np.asarray(self)[place]
        begin, end, _ = place.indices(self._count)
        wanted = max(end - begin, 0) * self.dtype.itemsize
        at = (self._begin + begin) * self.dtype.itemsize
        data = os.pread(self._file.descriptor, wanted, at)
        while len(data) < wanted:  # one call reads two gigabytes at most
            more = os.pread(self._file.descriptor, wanted - len(data), at + len(data))
            if not more:
                raise CheckpointError(f"{self.path}: was cut short while it was being read; restore it")
            data += more
        return np.frombuffer(data, dtype=self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.integer]:
        """Read all of it."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Compute with all of it."""
        arrays = [np.asarray(each) if isinstance(each, StoredTokens) else each for each in inputs]
        return getattr(ufunc, method)(*arrays, **options)
