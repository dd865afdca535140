"""The recurrence as a torch operator: its schema, who computes it, and its rules for tensors without values.

`torch.ops.throughtime.recurrence` is one layer in one direction, or, by kernels that can, in both at once, for every
cell. In its schema a request stands flat; inside it is a `Request`. Its derivatives stand in `operator.py`.

The input's dtype is that of output and state. Parameters may be wider (autocast): they are rounded for the computation,
and their gradients have their own dtype.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from throughtime import watching
from throughtime.backend import native, reference, triton
from throughtime.errors import unknown_name
from throughtime.request import Gradient, Request, Result, check_devices

library = torch.library.Library("throughtime", "DEF")
library.define(
    "recurrence(Tensor input, Tensor[] initial, Tensor[] parameters, Tensor? lengths, Tensor? reset, "
    "Tensor[] masks, str cell, bool reverse, bool keep, str backend, Tensor? batch_sizes=None, int recompute_every=0, "
    "bool bidirectional=False) "
    "-> (Tensor output, Tensor[] final, Tensor[] saved)"
)
library.define(
    "recurrence_backward(Tensor grad_output, Tensor[] grad_final, Tensor input, Tensor[] initial, Tensor[] parameters, "
    "Tensor output, Tensor[] saved, Tensor? lengths, Tensor? reset, Tensor[] masks, str cell, bool reverse, "
    "bool needs_input, str backend, Tensor? batch_sizes, int recompute_every, bool bidirectional) "
    "-> (Tensor grad_input, Tensor[] grad_initial, Tensor[] grad_parameters)"
)
BACKENDS = {"native": native, "triton": triton, "reference": reference}


def read(  # noqa: PLR0917 as the schema has it
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: list[Tensor],
    cell: str,
    reverse: bool,
    keep: bool,
    backend: str,
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
    bidirectional: bool = False,
) -> tuple[Request, bool, str]:
    """Return the request in the arguments of `recurrence`, whether a backward pass will follow, and who computes."""
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    request = Request.read(
        *(cell, input, initial, parameters),
        lengths=lengths,
        reset=reset,
        batch_sizes=batch_sizes,
        masks=masks or (),  # AOTInductor's packages hand over an empty list as None
        reverse=reverse,
        bidirectional=bidirectional,
        recompute_every=recompute_every,
    )
    return request, keep, backend


def flat(request: Request, keep: bool, backend: str) -> tuple[Any, ...]:
    """Return the arguments of `recurrence`."""
    tensors = (request.input, request.initial, request.parameters, request.lengths, request.reset)
    reverse, bidirectional = _ways(request)
    options = (request.spec.name, reverse, keep, backend, request.batch_sizes, request.recompute_every, bidirectional)
    return (*tensors, request.masks.to_list(), *options)


def read_backward(  # noqa: PLR0917 as the schema has it
    grad_output: Tensor,
    grad_final: list[Tensor],
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: list[Tensor],
    cell: str,
    reverse: bool,
    needs_input: bool,
    backend: str,
    batch_sizes: Tensor | None,
    recompute_every: int,
    bidirectional: bool,
) -> tuple[str, tuple[Request, Tensor, list[Tensor], Tensor, list[Tensor], bool]]:
    """Return who computes `recurrence_backward`, and the arguments of that backend's `backward`."""
    if output is None:
        raise TypeError("output is a NoneType; expected a tensor")
    tensors = input, initial, parameters, lengths, reset, masks
    request, *_ = read(*tensors, cell, reverse, True, backend, batch_sizes, recompute_every, bidirectional)
    return backend, (request, grad_output, grad_final, output, saved or [], needs_input)


def flat_backward(
    request: Request,
    backend: str,
    grads: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool,
) -> tuple[Any, ...]:
    """Return the arguments of `recurrence_backward`; `grads` are those of output and final state."""
    reverse, bidirectional = _ways(request)
    grad_output, *grad_final = filled(request, grads)
    tensors = (grad_output, grad_final, request.input, request.initial, request.parameters, output, saved)
    options = (request.spec.name, reverse, needs_input, backend, request.batch_sizes, request.recompute_every)
    return (*tensors, request.lengths, request.reset, request.masks.to_list(), *options, bidirectional)


def filled(request: Request, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients of output and final state, zeros where there are none."""
    of_output, *of_final = grads
    own = request.like.new_zeros(request.output_shape) if of_output is None else of_output
    return [own, *(torch.zeros_like(s) if g is None else g for g, s in zip(of_final, request.initial, strict=True))]


def _ways(request: Request) -> tuple[bool, bool]:
    """Return the schema's `reverse` and `bidirectional`."""
    is_both = len(request.directions) > 1
    return not is_both and request.directions[0].reverse, is_both


# Who computes -------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "recurrence", "CompositeExplicitAutograd")
def _compute(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    request, keep, backend = read(*arguments)
    output, final, saved = BACKENDS[backend].forward(request, keep)
    return output, final, saved


@torch.library.impl(library, "recurrence_backward", "CompositeExplicitAutograd")
def _compute_backward(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Backpropagate; where the input's gradient isn't needed an empty tensor stands for it."""
    backend, given = read_backward(*arguments)
    grad_input, grad_initial, grad_parameters = BACKENDS[backend].backward(*given)
    grad_output = given[1]
    return grad_output.new_empty(0) if grad_input is None else grad_input, grad_initial, grad_parameters


def compute(request: Request, keep: bool, backend: str, is_watched: bool) -> Result:
    """Compute by torch's dispatcher, or without it where nobody watches."""
    if not is_watched or watching.below_autograd is None:
        return BACKENDS[backend].forward(request, keep)
    return Result(*torch.ops.throughtime.recurrence.default(*flat(request, keep, backend)))


def compute_backward(
    request: Request,
    backend: str,
    grads: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool,
    is_watched: bool,
) -> Gradient:
    """Backpropagate by torch's dispatcher, or without it where nobody watches; `grads` are those of output and final state."""
    grad_output, *grad_final = grads
    if not is_watched or watching.below_autograd is None:
        return BACKENDS[backend].backward(request, grad_output, grad_final, output, saved, needs_input)
    flattened = flat_backward(request, backend, grads, output, saved, needs_input)
    return Gradient(*torch.ops.throughtime.recurrence_backward.default(*flattened))


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Return a context within which torch's operators are called below autograd, or as ever where torch has none."""
    return contextlib.nullcontext() if watching.below_autograd is None else watching.below_autograd()


@torch.library.register_fake("throughtime::recurrence", lib=library)
def fake(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return tensors like those of `recurrence`, for arguments that have no values."""
    watching.leave_to_inductor(torch.ops.throughtime.recurrence.default)
    request, keep, backend = read(*arguments)
    check_devices(request)
    computing = BACKENDS[backend]
    if len(request.directions) > 1 and (reason := computing.refusal(request)):
        raise NotImplementedError(f"backend {backend!r} can't serve this request: {reason}")
    # A step of the equations on tensors without values tells shapes and dtypes, or what doesn't fit.
    states = [reference.first_step(request, direction)[0] for direction in request.directions]
    output = states[0][0].new_empty(request.output_shape)
    final = [torch.empty_like(s) for state in states for s in state]
    return output, final, computing.fake_saved(request) if keep else []


@torch.library.register_fake("throughtime::recurrence_backward", lib=library)
def _fake_backward(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _, (request, grad_output, grad_final, output, saved, needs_input) = read_backward(*arguments)
    check_devices(request, grad_output=[grad_output], grad_final=grad_final, output=[output], saved=saved)
    grad_input = torch.empty_like(request.input) if needs_input else grad_output.new_empty(0)
    return grad_input, [torch.empty_like(s) for s in request.initial], [torch.empty_like(p) for p in request.parameters]
