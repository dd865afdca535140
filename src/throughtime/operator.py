"""The recurrence as layers call it, and its derivatives of first and second order.

`torch.ops.throughtime.recurrence`, whose schema and rule for tensors without values stand in `schema.py`, is differentiable twice
and more, so that `torch.compile` and `torch.export` see one opaque node whatever T is. Under torch.func's transforms
`transforms.py` computes.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import throughtime.flops  # noqa: F401 its formulas are there where the operator is
from throughtime import transforms, watching
from throughtime.backend import native, reference
from throughtime.onnx import translation
from throughtime.request import Request, Result
from throughtime.schema import below_autograd, compute, flat, flat_backward, library, read, read_backward


def run(request: Request, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Compute a layer: return output and final state.

    Where nobody watches, kernels are called without torch's dispatcher, and both passes share what was checked. Otherwise a
    training call takes 85 µs longer: as long as some twenty steps of a single row (docs/log.md).
    """
    if watching.is_transformed():
        return transforms.forward(request, backend)
    if watching.is_exported_to_onnx():
        translation.check(request)
        if watching.is_jit_traced():
            return translation.translate_traced(request)
    tensors = request.tensors()
    needs_gradient = _needs_gradient(tensors)
    if backend != "native" or watching.is_watched(tensors):
        keep = needs_gradient and not watching.is_jit_traced()  # whose graph is to serve with gradients and without
        output, final, _ = torch.ops.throughtime.recurrence.default(*flat(request, keep, backend))
    else:
        output, final, _ = _differentiable(request, tensors, needs_gradient, False, backend, is_watched=False)
    return output, final


# The derivative -----------------------------------------------------------------------------------------------------


class _Recurrence(torch.autograd.Function):
    """The derivative of `recurrence`, with the request's tensors in a row, as autograd.Function wants them.

    torch.library's own wrapper for lists goes through them with a general tree library, each way and in each pass: half a
    millisecond a call, as long as a hundred steps of a single row take.
    """

    @staticmethod
    def forward(ctx: Any, request: Request, keep: bool, backend: str, is_watched: bool, *tensors: Tensor | None) -> Any:
        shares_plan = not is_watched and backend == "native"
        with below_autograd():
            ctx.plan = native.shared_plan(request) if shares_plan else None
            if ctx.plan is not None:
                output, final, saved = ctx.plan.forward(request, keep)
                ctx.plan.let_go(request)
            else:
                output, final, saved = compute(request, keep, backend, is_watched)
        if output._is_view():  # of pooled memory; autograd would let nobody write to it
            output = output.data
        ctx.form, ctx.backend, ctx.needs_input = request.form(), backend, request.input.requires_grad
        ctx.set_materialize_grads(False)  # else autograd would make zeros as large as all that is saved
        ctx.save_for_backward(*tensors, output, *saved)
        if not is_watched:  # nobody asks for what is saved, and each tensor handed out costs autograd some microseconds
            return output, *final
        ctx.mark_non_differentiable(*saved)
        return output, *final, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        form, needs_input, plan = ctx.form, ctx.needs_input, ctx.plan
        total = form.total
        try:
            tensors = ctx.saved_tensors  # each access makes them anew, and checkpointing allows one
        except RuntimeError as error:
            tensors = _saved_with_output_again(ctx, error)
        ctx.plan = None  # what it holds goes when autograd's own tensors go; a second pass plans anew
        if watching.are_batched(grads) or watching.is_transformed():
            needs = ctx.needs_input_grad[4 : 4 + form.differentiable]
            made = transforms.backward(form, ctx.backend, needs, grads, tensors)
            return *[None] * 4, *made, *[None] * (total - len(made))
        request, (output, *saved) = form.request(tensors[:total]), tensors[total:]
        grad_output, grad_final = grads[0], grads[1 : 1 + form.states]
        # The derivative of the derivative is asked for by running this pass with gradients on.
        is_differentiated = torch.is_grad_enabled()
        is_watched = is_differentiated or watching.is_watched((*grads, *tensors))
        plan = None if plan is None or is_watched else plan.take_up(request)
        with contextlib.nullcontext() if is_differentiated else below_autograd():
            if plan is not None:
                made = plan.backward(request, grad_output, grad_final, output, saved, needs_input)
            else:
                flattened = flat_backward(request, ctx.backend, (grad_output, *grad_final), output, saved, needs_input)
                made = torch.ops.throughtime.recurrence_backward.default(*flattened)
        grad_input, grad_initial, grad_parameters = made
        wanted = [grad_input if needs_input else None, *grad_initial, *grad_parameters]
        return *[None] * 4, *wanted, *[None] * (total - len(wanted))


def _saved_with_output_again(ctx: Any, error: RuntimeError) -> list[Any]:
    """Return what was saved, where nothing but the output was written to since, as by `relu_`: it is computed again.

    Raises:
        RuntimeError: Autograd's own `error`: another tensor was written to, or the graph is gone.
    """
    total = ctx.form.total
    kept = watching.one_by_one(ctx)
    if not kept or watching.is_transformed():
        raise error
    try:
        tensors, saved = [unpack() for unpack in kept[:total]], [unpack() for unpack in kept[total + 1 :]]
    except RuntimeError:
        raise error from None
    with torch.no_grad(), below_autograd():
        again = compute(ctx.form.request(tensors), False, ctx.backend, watching.is_watched(tensors))
    return [*tensors, again.output, *saved]


def _differentiable(
    request: Request,
    tensors: Sequence[Tensor | None],
    needs_gradient: bool,
    keep: bool,
    backend: str,
    is_watched: bool,
) -> Result:
    """Compute, and keep what the derivative needs where one is wanted, or `keep` says so; `tensors` are the request's."""
    if not needs_gradient:
        with below_autograd():
            return compute(request, keep, backend, is_watched)
    output, *others = _Recurrence.apply(request, True, backend, is_watched, *tensors)
    states = len(request.directions) * len(request.spec.states)
    return Result(output, list(others[:states]), list(others[states:]))


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.library.impl(library, "recurrence", "Autograd")
def _with_gradient(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    request, keep, backend = read(*arguments)
    if watching.is_transformed():
        output, final, saved = reference.forward_openly(request)
    else:
        tensors = request.tensors()
        output, final, saved = _differentiable(
            request, tensors, _needs_gradient(tensors), keep, backend, is_watched=True
        )
    return output, final, saved


# The derivative of the derivative -----------------------------------------------------------------------------------


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, (request, grad_output, grad_final, _, saved, needs_input) = read_backward(*inputs)
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
    "throughtime::recurrence_backward", _differentiate_twice, setup_context=_save_for_second, lib=library
)
