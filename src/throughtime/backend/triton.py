"""The backend of the Triton kernels: a layer on an NVIDIA GPU, every cell, lengths and resets at no detour."""

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from throughtime.request import Gradient, Request, Result, check, check_kinds

if TYPE_CHECKING:
    from throughtime.kernels.triton.plan import Plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache
def missing() -> str | None:
    """Return why there are no Triton kernels in this installation, or `None` where there are."""
    return None if importlib.util.find_spec("triton") else "Triton isn't installed"


def description() -> str:
    """Say what computes."""
    return "Triton kernels for NVIDIA GPUs"


def refusal(request: Request) -> str | None:
    """Return why the kernels can't serve a request, or `None` where they can."""
    said, dtype, device = request.spec, request.dtype, request.input.device.type
    if dtype not in _DTYPES:
        return f"they compute float32, bfloat16 and float16, not {dtype}"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"they compute on an NVIDIA GPU, not on {device}"
    if request.directions[0].parameters.weight_hr is not None:
        return "they have no projection"
    if request.recompute_every:
        return "they keep all that their backward pass needs"
    if said.masks and len(request.directions) > 1:
        return (
            f"they run a {said.name} one way at a time, and bidirectional is true; call it with reverse false and true"
        )
    if (reason := missing()) is not None:
        return reason
    from throughtime.kernels.triton.plan import tilings

    if tilings(request) is None:
        hidden = request.directions[0].initial[0].shape[1]
        return f"a part of W_hh of {hidden} units doesn't fit into a multiprocessor of this GPU"
    return None


def forward(request: Request, keep: bool) -> Result:
    """Compute a layer; `saved` is empty unless `keep`, which says that a backward pass will follow."""
    return _plan(request).forward(keep)


def backward(
    request: Request,
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool = True,
) -> Gradient:
    """Backpropagate through time: gradients of the input (`None` if not needed), the initial state and the parameters."""
    return _plan(request).backward(grad_output, grad_final, output, saved, needs_input and not request.reads_ids)


def fake_saved(request: Request) -> list[Tensor]:
    """Return tensors like those that `forward` saves, for a request whose tensors have no values."""
    from throughtime.kernels.triton.plan import Plan

    return [request.like.new_empty(shape, dtype=dtype) for shape, dtype in Plan.saved_shapes(request)]


def _plan(request: Request) -> "Plan":
    check_kinds(request)
    if (reason := refusal(request)) is not None:
        raise NotImplementedError(f"backend 'triton' can't serve this request: {reason}")
    check(request)
    from throughtime.kernels.triton.plan import Plan

    return Plan(request)
