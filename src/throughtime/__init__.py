"""Recurrent networks for Python: layers, language models, and instruments for backpropagation through time.

A name of this package is imported when it is first used, and torch with it, so that the command line answers before torch is
there. The operator `torch.ops.throughtime.recurrence` is defined by `import throughtime.operator`, or by the first use of a layer.
"""

from typing import TYPE_CHECKING

from throughtime.errors import InputError, MissingKernelsWarning
from throughtime.lazy import on_first_use

if TYPE_CHECKING:
    from throughtime import init
    from throughtime.backend import backends
    from throughtime.conversion import convert, to_torch
    from throughtime.layers import GRU, LSTM, MGU, RNN
    from throughtime.lm.loaded import load
    from throughtime.onnx.reading import from_keras, from_onnx
    from throughtime.steps import GRUCell, LSTMCell, MGUCell, RNNCell
    from throughtime.streaming import export_c, export_onnx, stream

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "GRUCell",
    "InputError",
    "LSTMCell",
    "MGUCell",
    "MissingKernelsWarning",
    "RNNCell",
    "__version__",
    "backends",
    "convert",
    "export_c",
    "export_onnx",
    "from_keras",
    "from_onnx",
    "init",
    "load",
    "stream",
    "to_torch",
]

_HOMES = {
    "layers": ["GRU", "LSTM", "MGU", "RNN"],
    "backend": ["backends"],
    "conversion": ["convert", "to_torch"],
    "lm.loaded": ["load"],
    "onnx.reading": ["from_keras", "from_onnx"],
    "steps": ["GRUCell", "LSTMCell", "MGUCell", "RNNCell"],
    "streaming": ["export_c", "export_onnx", "stream"],
}
_MODULES = (
    "app",
    "backend",
    "cells",
    "init",
    "insight",
    "kernels",
    "layers",
    "lm",
    "operator",
    "spec",
    "steps",
    "streaming",
    "training",
)
__getattr__, __dir__ = on_first_use(__name__, _HOMES, _MODULES)
