"""The backend of the Triton kernels: a layer on an NVIDIA GPU, every cell, lengths and resets at no detour."""

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from throughtime.request import Gradient, Request, Result, check, check_kinds

if TYPE_CHECKING:
    from throughtime.kernels.triton.plan import Plan

_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IS_INSTALLED = (
    importlib.util.find_spec("triton") is not None
)  # once: torch.compile would trace a search, and warn of a cache


def missing() -> str | None:
    """Return why the kernels can't be had, or `None` where they can."""
    if not _IS_INSTALLED:
        return "Triton isn't installed"
    if is_interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no NVIDIA GPU here that torch can use"
    if (capability := tuple(torch.cuda.get_device_capability())) < (8, 0):
        return f"they need an NVIDIA GPU of compute capability 8.0 or newer, and this one has {'.'.join(map(str, capability))}"
    return None


def is_interpreted() -> bool:
    """Whether Triton's interpreter stands for a GPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def description() -> str:
    """Say what computes, and for which GPU."""
    gpu = "its interpreter" if is_interpreted() else torch.cuda.get_device_name()
    return f"Triton kernels, on {gpu}"


def refusal(request: Request) -> str | None:
    """Return why the kernels can't serve a request, or `None` where they can."""
    said, dtype, device = request.spec, request.dtype, request.input.device.type
    ways, parameters = len(request.directions), request.directions[0].parameters
    if dtype not in _DTYPES:
        return f"they compute float32, bfloat16 and float16, not {dtype}"
    if device != "cuda" and not (device == "cpu" and is_interpreted()):
        return f"they compute on an NVIDIA GPU, not on {device}"
    if said.base not in _CELLS:
        return f"they have no {said.base}"
    if parameters.weight_hr is not None:
        return "they have no projection"
    if request.recompute_every:
        return "they keep all that their backward pass needs"
    if said.masks and ways > 1:
        return (
            f"they run a {said.name} one way at a time, and bidirectional is true; call it with reverse false and true"
        )
    if (reason := missing()) is not None:
        return reason
    from throughtime.kernels.triton.plan import fits  # importing Triton takes half a second

    if not fits(request):
        hidden = parameters.weight_hh.shape[1]
        return f"W_hh of {hidden} units doesn't fit into the multiprocessors of this GPU"
    return None


def is_faster(request: Request) -> bool:
    """Whether the kernels are faster than cuDNN for a stack that both can serve (`benchmarks/gpu`, docs/gpu.md).

    cuDNN has a kernel that keeps its weights on the chip for float16 alone; what is ragged it takes step by step.
    """
    return request.dtype != torch.float16 or request.lengths is not None or request.batch_sizes is not None


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
