"""Recurrent networks for Python: layers, language models, and instruments for backpropagation through time."""

from throughtime import init
from throughtime.errors import InputError
from throughtime.layers import GRU, LSTM, RNN
from throughtime.ops import backends

__version__ = "0.1.0"

__all__ = ["GRU", "LSTM", "RNN", "InputError", "__version__", "backends", "init"]
