"""Recurrent networks for Python: layers, language models, and instruments for backpropagation through time.

A name of this package is imported when it is first used, and torch with it, so that the command line answers before torch is
there. The operator `torch.ops.throughtime.recurrence` is defined by `import throughtime.ops`, or by the first use of a layer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from throughtime.errors import InputError, MissingKernelsWarning

if TYPE_CHECKING:
    from throughtime import init
    from throughtime.layers import GRU, LSTM, RNN
    from throughtime.lm.loaded import load
    from throughtime.ops import backends

__version__ = "0.1.0"

__all__ = ["GRU", "LSTM", "RNN", "InputError", "MissingKernelsWarning", "__version__", "backends", "init", "load"]

_HOMES = {"GRU": "layers", "LSTM": "layers", "RNN": "layers", "backends": "ops", "load": "lm.loaded"}
_MODULES = ("app", "cells", "init", "insight", "kernels", "layers", "lm", "ops", "training")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # so that it is asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
