"""The recurrence as a torch operator: schema, fake rule, derivatives of first and second order, and transforms.

`torch.ops.throughtime.recurrence` is one layer in one direction, or, by kernels that can, in both at once, for every
cell. It has autograd rules (differentiable twice and more), and a fake rule, so that `torch.compile` and `torch.export` see one
opaque node whatever T is. In its schema a request stands flat; inside it is a `Request`.

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
from throughtime.request import Request, Result, check_devices

_library = torch.library.Library("throughtime", "DEF")
_library.define(
    "recurrence(Tensor input, Tensor[] initial, Tensor[] parameters, Tensor? lengths, Tensor? reset, "
    "Tensor[] masks, str cell, bool reverse, bool keep, str backend, Tensor? batch_sizes=None, int recompute_every=0, "
    "bool bidirectional=False) "
    "-> (Tensor output, Tensor[] final, Tensor[] saved)"
)
_library.define(
    "recurrence_backward(Tensor grad_output, Tensor[] grad_final, Tensor input, Tensor[] initial, Tensor[] parameters, "
    "Tensor output, Tensor[] saved, Tensor? lengths, Tensor? reset, Tensor[] masks, str cell, bool reverse, "
    "bool needs_input, str backend, Tensor? batch_sizes, int recompute_every, bool bidirectional) "
    "-> (Tensor grad_input, Tensor[] grad_initial, Tensor[] grad_parameters)"
)
_BACKENDS = {"native": native, "triton": triton, "reference": reference}


def run(request: Request, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Compute a layer: return output and final state.

    Where nobody watches, kernels are called without torch's dispatcher, and both passes share what was checked. Otherwise a
    training call takes 85 µs longer: as long as some twenty steps of a single row (docs/log.md).
    """
    if watching.is_transformed():
        output, final, _ = reference.forward_openly(request)
        return output, final
    tensors = request.tensors()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backend != "native" or watching.is_watched(tensors):
        output, final, _ = torch.ops.throughtime.recurrence.default(*_flat(request, keep, backend))
    else:
        output, final, _ = _differentiable(request, tensors, keep, backend, is_watched=False)
    return output, final


# The schema ---------------------------------------------------------------------------------------------------------


def _read(  # noqa: PLR0917 as the schema has it
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
    if backend not in _BACKENDS:
        raise unknown_name("backend", backend, _BACKENDS)
    request = Request.read(
        *(cell, input, initial, parameters),
        lengths=lengths,
        reset=reset,
        batch_sizes=batch_sizes,
        masks=masks,
        reverse=reverse,
        bidirectional=bidirectional,
        recompute_every=recompute_every,
    )
    return request, keep, backend


def _flat(request: Request, keep: bool, backend: str) -> tuple[Any, ...]:
    """Return the arguments of `recurrence`."""
    tensors = (request.input, request.initial, request.parameters, request.lengths, request.reset)
    reverse, bidirectional = _ways(request)
    options = (request.spec.name, reverse, keep, backend, request.batch_sizes, request.recompute_every, bidirectional)
    return (*tensors, request.masks.to_list(), *options)


def _read_backward(  # noqa: PLR0917 as the schema has it
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
    tensors = input, initial, parameters, lengths, reset, masks
    request, *_ = _read(*tensors, cell, reverse, True, backend, batch_sizes, recompute_every, bidirectional)
    return backend, (request, grad_output, grad_final, output, saved, needs_input)


def _flat_backward(
    request: Request,
    backend: str,
    grads: tuple[Tensor, list[Tensor]],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool,
) -> tuple[Any, ...]:
    """Return the arguments of `recurrence_backward`."""
    reverse, bidirectional = _ways(request)
    tensors = (*grads, request.input, request.initial, request.parameters, output, saved)
    options = (request.spec.name, reverse, needs_input, backend, request.batch_sizes, request.recompute_every)
    return (*tensors, request.lengths, request.reset, request.masks.to_list(), *options, bidirectional)


def _ways(request: Request) -> tuple[bool, bool]:
    """Return the schema's `reverse` and `bidirectional`."""
    is_both = len(request.directions) > 1
    return not is_both and request.directions[0].reverse, is_both


# Without derivatives ------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "recurrence", "CompositeExplicitAutograd")
def _compute(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    request, keep, backend = _read(*arguments)
    output, final, saved = _BACKENDS[backend].forward(request, keep)
    return output, final, saved


@torch.library.impl(_library, "recurrence_backward", "CompositeExplicitAutograd")
def _compute_backward(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Backpropagate; where the input's gradient isn't needed an empty tensor stands for it."""
    backend, given = _read_backward(*arguments)
    grad_input, grad_initial, grad_parameters = _BACKENDS[backend].backward(*given)
    grad_output = given[1]
    return grad_output.new_empty(0) if grad_input is None else grad_input, grad_initial, grad_parameters


def _compute_below_autograd(request: Request, keep: bool, backend: str, is_watched: bool) -> Result:
    """Compute by torch's dispatcher, or without it where nobody watches."""
    if not is_watched or watching.below_autograd is None:
        return _BACKENDS[backend].forward(request, keep)
    return Result(*torch.ops.throughtime.recurrence.default(*_flat(request, keep, backend)))


def _below_autograd() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if watching.below_autograd is None else watching.below_autograd()


@torch.library.register_fake("throughtime::recurrence", lib=_library)
def _fake(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    request, keep, backend = _read(*arguments)
    check_devices(request)
    computing = _BACKENDS[backend]
    if len(request.directions) > 1 and (reason := computing.refusal(request)):
        raise NotImplementedError(f"backend {backend!r} can't serve this request: {reason}")
    # A step of the equations on tensors without values tells shapes and dtypes, or what doesn't fit.
    states = [reference.first_step(request, direction)[0] for direction in request.directions]
    output = states[0][0].new_empty(request.output_shape)
    final = [torch.empty_like(s) for state in states for s in state]
    return output, final, computing.fake_saved(request) if keep else []


@torch.library.register_fake("throughtime::recurrence_backward", lib=_library)
def _fake_backward(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _, (request, grad_output, grad_final, output, saved, needs_input) = _read_backward(*arguments)
    check_devices(request, grad_output=[grad_output], grad_final=grad_final, output=[output], saved=saved)
    grad_input = torch.empty_like(request.input) if needs_input else grad_output.new_empty(0)
    return grad_input, [torch.empty_like(s) for s in request.initial], [torch.empty_like(p) for p in request.parameters]


# The derivative -----------------------------------------------------------------------------------------------------


class _Recurrence(torch.autograd.Function):
    """The derivative of `recurrence`, with the request's tensors in a row, as autograd.Function wants them.

    torch.library's own wrapper for lists goes through them with a general tree library, each way and in each pass: half a
    millisecond a call, as long as a hundred steps of a single row take.
    """

    @staticmethod
    def forward(ctx: Any, request: Request, keep: bool, backend: str, is_watched: bool, *tensors: Tensor | None) -> Any:
        shares_plan = not is_watched and backend == "native"
        with _below_autograd():
            ctx.plan = native.shared_plan(request) if shares_plan else None
            if ctx.plan is not None:
                output, final, saved = ctx.plan.forward(request, keep)
                ctx.plan.let_go(request)
            else:
                output, final, saved = _compute_below_autograd(request, keep, backend, is_watched)
        ctx.form, ctx.backend, ctx.needs_input = request.form(), backend, request.input.requires_grad
        ctx.set_materialize_grads(False)  # else autograd would make zeros as large as all that is saved
        ctx.save_for_backward(*tensors, output, *saved)
        ctx.mark_non_differentiable(*saved)
        return output, *final, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        form, needs_input, plan = ctx.form, ctx.needs_input, ctx.plan
        tensors = ctx.saved_tensors  # each access makes them anew, and checkpointing allows one
        ctx.plan = None  # what it holds goes when autograd's own tensors go; a second pass plans anew
        request, (output, *saved) = form.request(tensors[: form.total]), tensors[form.total :]
        grad_output, grad_final = grads[0], grads[1 : 1 + form.states]
        is_open = watching.are_batched(grads) or watching.is_transformed()
        # The derivative of the derivative is asked for by running this pass with gradients on.
        is_differentiated = torch.is_grad_enabled()
        is_watched = is_differentiated or is_open or watching.is_watched((*grads, *tensors))
        plan = None if plan is None or is_watched else plan.take_up(request)
        with contextlib.nullcontext() if is_open or is_differentiated else _below_autograd():
            if plan is not None:
                made = plan.backward(request, grad_output, grad_final, output, saved, needs_input)
            elif is_open:
                made = reference.backward_openly(request, *_filled(grad_output, grad_final, output, request.initial))
            else:
                filled = _filled(grad_output, grad_final, output, request.initial)
                flat = _flat_backward(request, ctx.backend, filled, output, saved, needs_input)
                made = torch.ops.throughtime.recurrence_backward.default(*flat)
        grad_input, grad_initial, grad_parameters = made
        wanted = [grad_input if needs_input else None, *grad_initial, *grad_parameters]
        return *[None] * 4, *wanted, *[None] * (form.total - len(wanted))


def _filled(
    grad_output: Tensor | None, grad_final: Sequence[Tensor | None], output: Tensor, initial: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of output and final state, zeros where there are none."""
    own, *others = [
        torch.zeros_like(like) if grad is None else grad
        for grad, like in zip((grad_output, *grad_final), (output, *initial), strict=True)
    ]
    return own, others


def _differentiable(
    request: Request, tensors: Sequence[Tensor | None], keep: bool, backend: str, is_watched: bool
) -> Result:
    """Compute, and keep the derivative where one is wanted; `tensors` are the request's."""
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        with _below_autograd():
            return _compute_below_autograd(request, keep, backend, is_watched)
    output, *others = _Recurrence.apply(request, keep, backend, is_watched, *tensors)
    states = len(request.directions) * len(request.spec.states)
    return Result(output, list(others[:states]), list(others[states:]))


@torch.library.impl(_library, "recurrence", "Autograd")
def _with_gradient(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    request, keep, backend = _read(*arguments)
    if watching.is_transformed():
        output, final, saved = reference.forward_openly(request)
    else:
        output, final, saved = _differentiable(request, request.tensors(), keep, backend, is_watched=True)
    return output, final, saved


# The derivative of the derivative -----------------------------------------------------------------------------------


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, (request, grad_output, grad_final, _, saved, needs_input) = _read_backward(*inputs)
    ctx.form, ctx.saved_count, ctx.needs_input = request.form(), len(saved), needs_input
    ctx.save_for_backward(grad_output, *grad_final, *request.tensors())


def _as_leaf(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _differentiate_twice(ctx: Any, grad_grad_input: Any, grad_grad_initial: Any, grad_grad_parameters: Any) -> Any:
    """Differentiate the backward pass by sending autograd through the equations, which are plain torch both ways."""
    form, tensors = ctx.form, ctx.saved_tensors
    of_input = 1 + form.states  # its place; token ids have no gradient
    end = of_input + form.differentiable
    with torch.enable_grad():
        leaves = [_as_leaf(t) for t in tensors[:end]]
        request = form.request([*leaves[of_input:], *tensors[end:]])
        made = reference.backward_openly(request, leaves[0], leaves[1:of_input])
    results, weights = [*made.initial, *made.parameters], [*grad_grad_initial, *grad_grad_parameters]
    if ctx.needs_input:
        results, weights = [made.input, *results], [grad_grad_input, *weights]
    asked = [leaf for leaf in leaves if leaf.is_floating_point()]
    found = torch.autograd.grad(results, asked, weights, allow_unused=True, create_graph=torch.is_grad_enabled())
    grads = list(found) if len(asked) == len(leaves) else [*found[:of_input], None, *found[of_input:]]
    initial = of_input + 1
    parameters = initial + form.states
    own = grads[0], grads[1:of_input], grads[of_input], grads[initial:parameters], grads[parameters:]
    without = None, [None] * ctx.saved_count, None, None, [None] * len(form.spec.masks), *[None] * 7
    return *own, *without


torch.library.register_autograd(
    "throughtime::recurrence_backward", _differentiate_twice, setup_context=_save_for_second, lib=_library
)
