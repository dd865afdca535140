"""Language models that are read by streams (`throughtime.stream`), where they can be, and how a text is read either way."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from throughtime.kernels import native
from throughtime.lm.fixed_window import FixedWindow
from throughtime.lm.model import LanguageModel, State
from throughtime.streaming import Stream, stream


def stream_of(model: LanguageModel, precision: str = "float32") -> Stream | None:
    """Return a stream of a model as it is now; `None` where the model itself is to be called.

    That is one on a GPU, a fixed window, weights that aren't float32, something that only looks like a language model, or an
    installation without kernels. A precision other than float32 is insisted on.

    Raises:
        InputError: There can be no stream of that precision.
    """
    if precision == "float32" and not _has_stream(model):
        return None
    return stream(model, precision=precision)


def _has_stream(model: LanguageModel) -> bool:
    if native.module is None or type(model) is not LanguageModel or isinstance(model.recurrent, FixedWindow):
        return False
    is_altered = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    return not is_altered and all(p.dtype == torch.float32 and p.is_cpu for p in model.parameters())


class Reader(Protocol):
    """Reads rows of text window by window, its states carried from one to the next."""

    def begin(self) -> None:
        """Begin all rows anew."""
        ...

    def begin_row(self, row: int) -> None:
        """Begin a row anew."""
        ...

    def read(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits (T, B, V) after each of the ids (T, B); past a row's length they mean nothing."""
        ...


class ModelReader:
    """Reads by calling a model."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._state: State | None = None

    def begin(self) -> None:
        """Begin all rows anew."""
        self._state = None

    def begin_row(self, row: int) -> None:
        """Begin a row anew."""
        for tensor in self._state or ():
            tensor[:, row] = 0

    def read(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits (T, B, V) after each of the ids (T, B)."""
        lengths = None if lengths is None else lengths.to(self._device)
        logits, self._state = self._model(ids.to(self._device), self._state, lengths)
        return logits


class StreamReader:
    """Reads up to so many rows with streams of some precision."""

    def __init__(self, model: LanguageModel, precision: str, rows: int) -> None:
        self._streams = stream(model, streams=rows, precision=precision, threads=torch.get_num_threads())

    def begin(self) -> None:
        """Begin all rows anew."""
        self._streams.reset()

    def begin_row(self, row: int) -> None:
        """Begin a row anew."""
        self._streams.reset(row)

    def read(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits (T, B, V) after each of the ids (T, B)."""
        return self._streams.feed(ids.clamp_min(0), which=np.arange(ids.shape[1]))


def reader_of(model: LanguageModel, precision: str, rows: int) -> Reader:
    """Return what reads so many rows: streams; in float32 the model where there are several rows, or can be no stream."""
    if precision == "float32" and (rows > 1 or not _has_stream(model)):
        return ModelReader(model)
    return StreamReader(model, precision, rows)
