"""The native backend's two passes over one layer, whose tensors stand in flat lists as in the operator's schema."""

from typing import Any

from torch import Tensor

from throughtime.backend import native
from throughtime.request import Gradient, Request, Result


def forward(
    cell: str,
    input: Any,
    initial: Any,
    parameters: Any,
    lengths: Any = None,
    reset: Any = None,
    reverse: bool = False,
    keep: bool = True,
    **more: Any,
) -> Result:
    request = Request.read(cell, input, initial, parameters, lengths=lengths, reset=reset, reverse=reverse, **more)
    return native.forward(request, keep)


def backward(
    given: tuple[Any, ...],
    grad_output: Tensor | None,
    grad_final: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    needs_input: bool = True,
    **more: Any,
) -> Gradient:
    """`given` is what `forward` was given: cell, input, initial, parameters[, lengths[, reset[, reverse]]]."""
    names = dict(zip(("lengths", "reset", "reverse"), given[4:], strict=False))
    request = Request.read(*given[:4], **names, **more)
    return native.backward(request, grad_output, grad_final, output, saved, needs_input)
