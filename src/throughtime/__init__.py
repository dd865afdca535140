"""Recurrent networks for Python: layers, language models, and instruments for backpropagation through time.

A name of this package is imported when it is first used, and torch with it, so that the command line answers before torch is
there. The operator `torch.ops.throughtime.recurrence` is defined by `import throughtime.ops`, or by the first use of a layer.
"""

from typing import TYPE_CHECKING

from throughtime.errors import InputError, MissingKernelsWarning
from throughtime.lazy import on_first_use

if TYPE_CHECKING:
    from throughtime import init
    from throughtime.layers import GRU, LSTM, RNN
    from throughtime.lm.loaded import load
    from throughtime.ops import backends

__version__ = "0.1.0"

__all__ = ["GRU", "LSTM", "RNN", "InputError", "MissingKernelsWarning", "__version__", "backends", "init", "load"]

_HOMES = {"layers": ["GRU", "LSTM", "RNN"], "ops": ["backends"], "lm.loaded": ["load"]}
_MODULES = ("app", "cells", "init", "insight", "kernels", "layers", "lm", "ops", "training")
__getattr__, __dir__ = on_first_use(__name__, _HOMES, _MODULES)
