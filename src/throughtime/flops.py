"""Floating-point operations of the operator, for `torch.utils.flop_counter.FlopCounterMode`.

They are those of its matrix products, as torch counts everything else: what the same layer costs as a loop over `linear`, in which
everything has a gradient. Lengths count where they have values; token ids are rows of W_ih, and no product.

Importing this module registers the formulas with torch, as soon as somebody imports the counter: that imports Triton, where it is
installed, which takes half a second.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from throughtime import schema, watching
from throughtime.request import Request

_operators = torch.ops.throughtime


def _real_steps(request: Request) -> int:
    """Return how many steps are computed, of all rows together; where lengths have no values, every row is as long as can be."""
    if request.batch_sizes is not None:
        return request.input.shape[0]
    if request.lengths is not None and watching.has_values(request.lengths):
        return int(request.lengths.sum())
    return request.steps * request.batch


def _products(request: Request) -> tuple[int, int]:
    """Return the operations of products with the input, and of those with the state: 2 for each element of a matrix and step."""
    of_input = of_state = 0
    for direction in request.directions:
        p = direction.parameters
        of_input += 0 if request.reads_ids else p.weight_ih.numel()
        of_state += p.weight_hh.numel() + (0 if p.weight_hr is None else p.weight_hr.numel())
    steps = _real_steps(request)
    return 2 * steps * of_input, 2 * steps * of_state


def forward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """Return the operations of `recurrence`, whose arguments these are.

    Example:
        >>> import torch, throughtime
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> layer, x = throughtime.LSTM(5, 8), torch.randn(20, 3, 5)
        >>> with FlopCounterMode(display=False) as counter:
        ...     output, _ = layer(x)
        >>> counter.get_total_flops() == 2 * 20 * 3 * 4 * 8 * (5 + 8)
        True
    """
    request, *_ = schema.read(*arguments, **named)
    return sum(_products(request))


def backward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """Return the operations of `recurrence_backward`: each product twice, for what it multiplies and for its matrix.

    What is recomputed counts again; what the input's gradient would cost, only where it is asked for.
    """
    _, (request, *_, needs_input) = schema.read_backward(*arguments, **named)
    of_input, of_state = _products(request)
    again = of_input + of_state if request.recompute_every else 0
    return (2 if needs_input else 1) * of_input + 2 * of_state + again


_COUNTER = "torch.utils.flop_counter"


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(_operators.recurrence, get_raw=True)(forward)
    counter.register_flop_formula(_operators.recurrence_backward, get_raw=True)(backward)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported, and is gone then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found is not None and found.loader is not None:
            execute = found.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            found.loader.exec_module = execute_and_register
        return found


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
