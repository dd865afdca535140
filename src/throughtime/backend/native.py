"""The backend of the C++ kernels: what they refuse, and the passes that compute the rest."""

import math
from collections.abc import Sequence

from torch import Tensor

from throughtime.kernels import native as kernels
from throughtime.kernels.layout import count_segments
from throughtime.kernels.native import arithmetic_of
from throughtime.kernels.plan import Plan
from throughtime.kernels.whole import WholePlan, is_whole
from throughtime.request import Gradient, Request, Result, check, check_kinds


def refusal(request: Request) -> str | None:
    """Return why the kernels can't serve a request, or `None` where they can."""
    said, dtype, device = request.spec, request.dtype, request.input.device.type
    if device != "cpu" or dtype not in kernels.DTYPES:
        return f"they compute float32, float64 and bfloat16 on the CPU, not {dtype} on {device}"
    if said.masks and len(request.directions) > 1:
        return (
            f"they run a {said.name} one way at a time, and bidirectional is true; call it with reverse false and true"
        )
    if kernels.missing is None and not kernels.knows(said):
        return f"they have no {said.base}"
    return kernels.missing


def forward(request: Request, keep: bool) -> Result:
    """Compute a layer; `saved` is empty unless `keep`, which says that a backward pass will follow."""
    _check(request)
    if is_whole(request):
        return WholePlan(request).forward(request, keep)
    return Plan(request).forward(request, keep, in_graph=True)


def backward(
    request: Request,
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool = True,
) -> Gradient:
    """Backpropagate through time.

    Args:
        request: What `forward` was given.
        grad_output: ∂L/∂output, or `None` for zero; its values past a row's end don't matter.
        grad_final: Gradients of the final states; each may be `None` for zero.
        output: What `forward` returned.
        saved: What `forward` returned; it isn't changed.
        needs_input: Whether the input's gradient is wanted; token ids have none.
    """
    return shared_plan(request).backward(request, grad_output, grad_final, output, saved, needs_input)


def shared_plan(request: Request) -> Plan | WholePlan:
    """Return what both passes over a request share."""
    _check(request)
    return WholePlan(request) if is_whole(request) else Plan(request)


def fake_saved(request: Request) -> list[Tensor]:
    """Return tensors like those that `forward` saves, for a request whose tensors have no values."""
    saved = kernels.cell(request.spec).saved
    if not saved:
        return []
    hidden, wide = (
        request.directions[0].parameters.weight_hh.shape[0] // request.spec.gates,
        arithmetic_of(request.dtype),
    )
    if request.recompute_every:
        count = count_segments(request, hidden)
        return [s.new_empty((count, *s.shape), dtype=arithmetic_of(s.dtype)) for s in request.initial]
    *places, _ = request.output_shape
    rows = math.prod(places)
    return [
        request.like.new_empty((rows, it.width(hidden)), dtype=wide if it.is_wide else request.dtype)
        for _ in request.directions
        for it in saved
    ]


def _check(request: Request) -> None:
    check_kinds(request)
    if (reason := refusal(request)) is not None:
        raise NotImplementedError(f"backend 'native' can't serve this request: {reason}")
    check(request, (request.dtype, arithmetic_of(request.dtype)))
