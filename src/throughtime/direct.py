"""Layers without gradient in one native call, the whole stack and all its steps.

A step of a single row is a few microseconds' work, less than it takes in Python to say what is asked of each layer. So calls are
told here by what they need not ask: no gradient, no lengths or resets, plain tensors of one dtype on the CPU, nobody who watches.
Every other call, one that is wrong among them, is refused with `None` or false, and goes by `stack.run`. Nothing is kept between
calls: what is computed with is what the parameters are at that moment. The bits are the same on both ways.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime import watching
from throughtime.kernels import native
from throughtime.kernels.layout import steps_of_a_forward_stretch
from throughtime.spec import Spec

_CALLS: dict[torch.dtype, Any] = {}
_WEIGHTS: tuple[str, ...] = ()  # of a direction, in the order in which the native calls take them
if native.module is not None:
    _CALLS = {torch.float32: native.module.forward_stack_f32, torch.float64: native.module.forward_stack_f64}
    _WEIGHTS = tuple(native.module.stack_weights())


class Sizes(NamedTuple):
    """Layers on top of each other, apart from their tensors.

    Attributes:
        spec: What the cell's name says, without masks.
        input: I.
        hidden: H.
        projected: P, or 0 without a projection.
        directions: 1, or 2 if each layer runs both ways.
        parameters: For each direction of each layer its weights, in the order of a native call: name and shape, or `None`.
    """

    spec: Spec
    input: int
    hidden: int
    projected: int
    directions: int
    parameters: tuple[tuple[str, tuple[int, ...]] | None, ...]


@lru_cache
def sizes_of_layers(
    spec: Spec, input: int, hidden: int, projected: int, num_layers: int, bidirectional: bool, has_bias: bool
) -> Sizes:
    """Return the sizes of layers whose parameters have torch.nn's names."""
    ways, found = ("", "_reverse")[: 2 if bidirectional else 1], []
    for layer in range(num_layers):
        width = (projected or hidden) * len(ways) if layer else input
        shapes = spec.parameter_shapes(width, hidden, projected, has_bias=has_bias)
        for way in ways:
            found += [(f"{name}_l{layer}{way}", shapes[name]) if name in shapes else None for name in _WEIGHTS]
    return Sizes(spec, input, hidden, projected, len(ways), tuple(found))


@lru_cache
def sizes_of_cell(spec: Spec, input: int, hidden: int, has_bias: bool) -> Sizes:
    """Return the sizes of one of torch.nn's cells."""
    shapes = spec.parameter_shapes(input, hidden, has_bias=has_bias)
    return Sizes(spec, input, hidden, 0, 1, tuple([(n, shapes[n]) if n in shapes else None for n in _WEIGHTS]))


def is_served(parameters: Mapping[str, Tensor | None], input: object, state: Sequence[Any] | None) -> bool:
    """Whether a call may be served here, as far as its input and state tell, whose shapes are for the caller to check.

    Of the parameters it looks at the first, which tells a training call from others.
    """
    if torch.compiler.is_compiling() or type(input) is not Tensor or input.dtype not in _CALLS or not input.numel():
        return False
    first, dtype, has_gradient = next(iter(parameters.values()), None), input.dtype, torch.is_grad_enabled()
    if first is None or (has_gradient and first.requires_grad):
        return False
    tensors = (input,) if state is None else (input, *state)
    if watching.is_transformed() or watching.is_watched(tensors) or torch.is_autocast_enabled("cpu"):
        return False
    return all(_is_plain(tensor, dtype, has_gradient) for tensor in tensors)


def forward(
    sizes: Sizes,
    parameters: Mapping[str, Tensor | None],
    input: Tensor,
    output: Tensor | None,
    state: Sequence[Tensor],
) -> bool:
    """Compute the layers, or return false where the parameters are for the long way.

    Args:
        sizes: What to compute.
        parameters: By name.
        input: (T, B, I), or (B, I) for one step, contiguous.
        output: A place for the last layer's, (T, B, directions · P), or `None` where nobody wants it.
        state: The state before, (layers · directions, B, ·) each, contiguous, which becomes the state after.
    """
    addresses, dtype, has_gradient = [], input.dtype, torch.is_grad_enabled()
    held = [
        input.untyped_storage()
    ]  # until the call is over: meanwhile other threads may exchange a parameter, or its memory
    for place in sizes.parameters:
        if place is None:
            addresses.append(0)
            continue
        name, shape = place
        tensor = parameters.get(name)
        if tensor is None or type(tensor) not in watching.PLAIN or tensor.shape != shape:
            return False
        if not _is_plain(tensor, dtype, has_gradient) or not tensor.is_contiguous():
            return False
        held.append(tensor.untyped_storage())
        addresses.append(tensor.data_ptr())
    steps, batch = input.shape[:2] if input.dim() == 3 else (1, input.shape[0])
    spec = sizes.spec
    _CALLS[dtype](
        native.cell(spec).number,
        spec.gates,
        bool(spec.variants),
        torch.get_num_threads(),
        steps,
        steps_of_a_forward_stretch(batch, spec.gates * sizes.hidden, dtype.itemsize),
        batch,
        sizes.input,
        sizes.hidden,
        sizes.projected,
        sizes.directions,
        input.data_ptr(),
        addresses,
        0 if output is None else output.data_ptr(),
        state[0].data_ptr(),
        state[1].data_ptr() if len(state) > 1 else 0,
    )
    return True


def _is_plain(tensor: Tensor | None, dtype: torch.dtype, has_gradient: bool) -> bool:
    """Whether a tensor is dense memory on the CPU, of this dtype, and no gradient is wanted of it."""
    return (
        tensor is not None
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
        and not (has_gradient and tensor.requires_grad)
    )
