"""torch.func's transforms on the kernels: gradients, and `vmap` over all but the parameters.

In both functions here, forward and back to the gates, no row of a batch ever meets another. So their rule for `vmap` is to fold
what is mapped into the batch, and one pass of the kernels serves all of it. What sums over rows, the gradients of the
parameters, are products in plain torch above them, which `vmap` turns into products of each one's own rows: gradients by sample
cost a pass over the batch and these products.

What has no rule here is computed by the equations, in plain torch, so that each of their steps is transformed like any other
code: forward mode, `vmap` over parameters that differ or over packed rows, all that a compiler traces; on the way back under
`vmap` also cells whose parameters' gradients the gates don't tell (normalised, with peepholes, projected); and derivatives of a
derivative. Parameters that are mapped and don't differ, copies that an `expand` made, get each its own gradient by the kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from throughtime import schema, watching
from throughtime.backend import reference
from throughtime.kernels import native as kernels
from throughtime.request import Form, Request

_WITH_RULES = {"Grad", "Vmap"}
_COPIES = 256 << 20  # bytes that copies of what isn't mapped may take beside what is


def refusal(request: Request) -> str | None:
    """Return why kernels can't serve a request under the transforms that are on, or `None` where they can."""
    kinds = watching.transforms()
    if not kinds <= _WITH_RULES:
        return "they have no rule for forward-mode differentiation, nor for a transform that is traced"
    tensors = request.tensors()
    mapped = [t is not None and watching.is_mapped(t) for t in tensors] if "Vmap" in kinds else []
    if not any(mapped):
        return None
    if request.batch_sizes is not None:
        return "they have no rule for vmap over packed rows"
    axes = _axes(request.form(), tensors, [None] * len(tensors))
    whole = any(is_mapped and axis is None for is_mapped, axis in zip(mapped, axes, strict=True))
    if whole and not _has_copies(request):
        return "they have no rule for vmap over parameters"
    return None


def _has_copies(request: Request) -> bool:
    """Whether the parameters are mapped, and all of them the same: what differs is whose gradient is whose."""
    numbers = [mask for mask in request.masks.to_list() if not mask.dim()]
    is_plain = reference.tells_by_gates(request) and not any(map(watching.is_mapped, numbers))
    return is_plain and watching.transforms() == {"Vmap"} and all(map(watching.is_copy, request.parameters))


@dataclass(frozen=True)
class _Asked:
    """What is asked of `_Forward` and `_Backward` apart from tensors. No tuple, whose parts torch would look at one by one.

    Attributes:
        form: The request without its tensors.
        backend: Who computes.
        has_copies: Of a forward pass: whether parameters have an axis in front, of copies for as many parts of the batch, each
            of which is to get its own gradient.
        keeps: Of a forward pass: whether a gradient may be asked for that no tensor's `requires_grad` tells of.
        needs_input: Of a backward pass, as all below: whether it returns the input's gradient.
        wants: What it returns after that and the initial state's: "parameters", their gradients; "gates", ∂a of each direction,
            (B, T, G·H); or nothing, "".
        computes_again: Whether what the forward pass saved isn't there.
    """

    form: Form
    backend: str
    has_copies: bool = False
    keeps: bool = False
    needs_input: bool = False
    wants: str = ""
    computes_again: bool = False


def forward(request: Request, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Compute a layer while transforms are on: return output and final state."""
    if backend != "native" or refusal(request):
        output, final, _ = reference.forward_openly(request)
        return output, final
    keeps = torch.is_grad_enabled() and "Grad" in watching.transforms()
    asked = _Asked(request.form(), backend, _has_copies(request), keeps)
    output, *others = _Forward.apply(asked, *request.tensors())
    return output, others[: asked.form.states]


def backward(
    form: Form, backend: str, needs: Sequence[bool], grads: Sequence[Tensor | None], tensors: Sequence[Any]
) -> list[Tensor | None]:
    """Backpropagate while transforms are on, or after them: return gradients of those of the request's tensors that may have one.

    Args:
        form: The request without its tensors.
        backend: Who has computed it.
        needs: Of each of those tensors, whether its gradient is wanted.
        grads: Gradients of output and final state, `None` for zero.
        tensors: The request's, the output, and what the forward pass saved.
    """
    own, (output, *saved) = _cut(tensors, form.total)
    request, grads = form.request(own), grads[: 1 + form.states]
    needs_input, needs_parameters = needs[0], any(needs[1 + form.states :])
    kinds = watching.transforms()
    if not kinds <= _WITH_RULES or watching.are_batched(grads):
        return _backward_openly(request, grads)
    if "Vmap" not in kinds:
        asked = _Asked(form, backend, needs_input=needs_input, wants="parameters")
        made = _Backward.apply(asked, *grads, *own, output, *saved)
        return [*([] if needs_input else [None]), *made]
    if request.batch_sizes is not None or (needs_parameters and not reference.tells_by_gates(request)):
        return _backward_openly(request, grads)
    saved, computes_again = (_by_row(request, saved), False) if _is_regular(request) else ([], True)
    if not needs_parameters:
        asked = _Asked(form, backend, needs_input=needs_input, computes_again=computes_again)
        made = _Backward.apply(asked, *grads, *own, output, *saved)
        return [*([] if needs_input else [None]), *made, *[None] * len(request.parameters)]
    asked = _Asked(form, backend, wants="gates", computes_again=computes_again)
    made = _Backward.apply(asked, *grads, *own, output, *saved)
    with torch.autocast(request.input.device.type, enabled=False):
        grad_input, parameters = reference.backward_from_gates(
            request, made[form.states :], output, needs_input, _Products.apply
        )
    return [grad_input, *made[: form.states], *parameters]


def _backward_by_copy(
    form: Form, backend: str, needs: Sequence[bool], grads: Sequence[Tensor | None], tensors: Sequence[Any]
) -> list[Tensor | None]:
    """Backpropagate where each part of the batch has its own copy of the parameters: as `backward`."""
    own, (output, *saved) = _cut(tensors, form.total)
    count, states = own[1 + form.states].shape[0], form.states
    request, (parts, dims) = form.request(_first_copies(form, own)), _by_copy(form, own, count)
    grads = schema.filled(request, grads[: 1 + states])
    if torch.is_grad_enabled() or watching.is_transformed() or watching.are_batched(grads):
        of_each = [_parts(grad, axis, count) for grad, axis in zip(grads, (1, *[0] * states), strict=True)]
        found: Any = torch.vmap(
            lambda grads, tensors: tuple(_backward_openly(form.request(tensors), grads)),
            in_dims=([1, *[0] * states], dims),
            out_dims=(1, *[0] * (form.differentiable - 1)),
        )(of_each, parts)
        return [found[0].flatten(1, 2), *(g.flatten(0, 1) for g in found[1 : 1 + states]), *found[1 + states :]]
    asked = _Asked(form, backend, wants="gates", computes_again=form.recompute_every > 0)
    saved = [] if asked.computes_again else saved
    made = _Backward.apply(asked, *grads, *_first_copies(form, own), output, *saved)
    at_gates = [_parts(grad_a, 0, count) for grad_a in made[states:]]

    def from_gates(at_gates: list[Tensor], tensors: list[Any], output: Tensor) -> tuple[Tensor, ...]:
        given = form.request(tensors), at_gates, output, needs[0]
        grad_input, parameters = reference.backward_from_gates(*given, _Products.apply)
        return (*([] if grad_input is None else [grad_input]), *parameters)

    out_dims = (*([1] if needs[0] else []), *[0] * len(request.parameters))
    with torch.autocast(request.input.device.type, enabled=False):
        found = torch.vmap(from_gates, in_dims=(0, dims, 1), out_dims=out_dims)(
            at_gates, parts, _parts(output, 1, count)
        )
    grad_input = [found[0].flatten(1, 2)] if needs[0] else [None]
    return [*grad_input, *made[:states], *found[len(out_dims) - len(request.parameters) :]]


def _by_copy(form: Form, tensors: Sequence[Any], count: int) -> tuple[list[Any], list[int | None]]:
    """Return a request's tensors with an axis for so many copies of the parameters, or parts of the batch, and that axis."""
    parts: list[Any] = []
    dims: list[int | None] = []
    for place, (tensor, axis) in enumerate(zip(tensors, _axes(form, tensors, [None] * form.total), strict=True)):
        if tensor is None or axis is None:
            parts.append(tensor)
            dims.append(0 if form.states < place < form.differentiable else None)
        else:
            parts.append(_parts(tensor, axis, count))
            dims.append(axis)
    return parts, dims


def _first_copies(form: Form, tensors: Sequence[Any]) -> list[Any]:
    """Return a request's tensors with the first copy of each parameter."""
    return [t[0] if form.states < place < form.differentiable else t for place, t in enumerate(tensors)]


def _parts(tensor: Tensor, axis: int, count: int) -> Tensor:
    """Return a tensor whose rows are cut in so many parts, along an axis of their own."""
    return tensor.unflatten(axis, (count, tensor.shape[axis] // count))


def _cut(tensors: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    return tensors[:count], tensors[count:]


def _backward_openly(request: Request, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    grad_output, *grad_final = schema.filled(request, grads)
    made = reference.backward_openly(request, grad_output, grad_final)
    return [made.input, *made.initial, *made.parameters]


def _is_regular(request: Request) -> bool:
    """Whether what the forward pass saves has a row for each step of each sequence."""
    return request.lengths is None and request.batch_sizes is None and not request.recompute_every


def _by_row(request: Request, saved: Sequence[Tensor]) -> list[Tensor]:
    """Return what was saved as (T, B, ·), if it is regular."""
    if not _is_regular(request):
        return list(saved)
    return [s.unflatten(0, request.input.shape[:2]) if s.dim() == 2 else s for s in saved]


# Functions that torch transforms --------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    """`_Asked` and the request's tensors → output, final state, and what is saved."""

    @staticmethod
    def forward(asked: _Asked, *tensors: Tensor | None) -> tuple[Any, ...]:
        request = asked.form.request(_first_copies(asked.form, tensors) if asked.has_copies else tensors)
        keep = asked.keeps or any(t is not None and t.requires_grad for t in tensors)
        with schema.below_autograd():
            output, final, saved = schema.compute(request, keep, asked.backend, watching.is_watched(tensors))
        return output, *final, *_by_row(request, saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.asked, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[:1], *output[1 + ctx.asked.form.states :])
        ctx.mark_non_differentiable(*output[1 + ctx.asked.form.states :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        form = ctx.asked.form
        needs = ctx.needs_input_grad[1 : 1 + form.differentiable]
        way = _backward_by_copy if ctx.asked.has_copies else backward
        made = way(form, ctx.asked.backend, needs, grads, ctx.saved_tensors)
        return None, *made, *[None] * (form.total - len(made))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        asked, *tensors = args
        states, is_regular = asked.form.states, _is_regular(asked.form.request(tensors))

        def run(*folded: Tensor | None) -> tuple[Tensor, ...]:
            made = _Forward.apply(asked, *folded)
            return made if is_regular else made[: 1 + states]  # the rest has no axis that many rows could be told by

        return _fold(
            run, info.batch_size, tensors, in_dims[1:], _axes(asked.form, tensors, in_dims[1:]), (1, *[0] * states)
        )


class _Backward(torch.autograd.Function):
    """`_Asked`, gradients of output and final state, the request's tensors, the output, what was saved → what `_Asked` tells."""

    @staticmethod
    def forward(asked: _Asked, *given: Any) -> tuple[Any, ...]:
        first = 1 + asked.form.states
        grads, (tensors, (output, *saved)) = given[:first], _cut(given[first:], asked.form.total)
        request, is_watched = asked.form.request(tensors), watching.is_watched(given)
        with schema.below_autograd():
            if asked.computes_again:
                request = request._replace(recompute_every=0)
                saved = schema.compute(request, True, asked.backend, is_watched).saved
            elif _is_regular(request):
                saved = [s.flatten(0, 1) for s in saved]
            at = _with_a_column_each(request) if asked.wants == "gates" else request
            made = schema.compute_backward(at, asked.backend, grads, output, saved, asked.needs_input, is_watched)
        return (*([made.input] if asked.needs_input else []), *made.initial, *_wanted(asked, request, made.parameters))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.asked, *given = inputs
        ctx.others = len(given) - (count := 1 + ctx.asked.form.states + ctx.asked.form.total)
        ctx.save_for_backward(*given[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the equations' backward pass."""
        asked, form, given = ctx.asked, ctx.asked.form, list(ctx.saved_tensors)
        first = 1 + form.states
        count = first + form.differentiable
        places = [place for place, t in enumerate(given[:count]) if t is not None and t.is_floating_point()]

        def openly(*leaves: Tensor) -> tuple[Any, ...]:
            own = list(given)
            for place, leaf in zip(places, leaves, strict=True):
                own[place] = leaf
            request = form.request(own[first:])
            grad_output, *grad_final = schema.filled(request, own[:first])
            if asked.wants == "gates":
                at_gates, grad_initial = reference.backward_to_gates_openly(request, grad_output, grad_final)
                return (*grad_initial, *at_gates)
            made = reference.backward_openly(request, grad_output, grad_final)
            parameters = made.parameters if asked.wants else []
            return (*([made.input] if asked.needs_input else []), *made.initial, *parameters)

        _, pull, *_ = torch.func.vjp(openly, *[given[place] for place in places])
        found: list[Tensor | None] = [None] * len(given)
        for place, grad in zip(places, pull(grads), strict=True):
            found[place] = grad
        return None, *found, *[None] * ctx.others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        asked, *given = args
        assert asked.wants != "parameters"  # which sum over rows, and are asked for outside of vmap only
        form, first, dims = asked.form, 1 + asked.form.states, in_dims[1:]
        of_request = slice(first, first + form.total)
        states = [0] * form.states
        axes = [1, *states, *_axes(form, given[of_request], dims[of_request])]
        axes += [1] * (len(given) - len(axes))
        made = [*([1] if asked.needs_input else []), *states, *([0] * len(form.ways) if asked.wants else [])]
        return _fold(lambda *folded: _Backward.apply(asked, *folded), info.batch_size, given, dims, axes, made)


class _Products(torch.autograd.Function):
    """aᵀ b for a (…, rows, m) and b (…, rows, n), in the kernels' pooled memory: fresh pages cost as much as the products."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        if watching.is_watched((a, b)):
            return a.mT @ b
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return torch.matmul(a.mT, b, out=kernels.new(a, *batch, a.shape[-1], b.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (a, b) = grads, ctx.saved_tensors
        return b @ grad.mT, a @ grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        first = [t[None] if dim is None else t.movedim(dim, 0) for t, dim in zip(args, in_dims, strict=True)]
        return _Products.apply(*first), 0


def _with_a_column_each(request: Request) -> Request:
    """Return a request whose gradient of W_ih is ∂a: to the backward pass each step of a row is a token of its own.

    Tokens are numbered row by row, so that ∂a of a row stands together. What would be in the columns nobody reads.
    """
    steps, batch = request.steps, request.batch
    ids = torch.arange(batch * steps, device=request.input.device).view(batch, steps).t()
    directions = []
    for direction in request.directions:
        weight_ih = direction.parameters.weight_ih
        table = weight_ih.new_zeros(()).expand(weight_ih.shape[0], max(1, ids.numel()))
        directions.append(direction._replace(parameters=direction.parameters._replace(weight_ih=table)))
    return request._replace(input=ids, directions=tuple(directions))


def _wanted(asked: _Asked, request: Request, grad_parameters: list[Tensor]) -> list[Tensor]:
    """Return the parameters' gradients, ∂a (B, T, G·H) of each direction, or nothing."""
    if asked.wants != "gates":
        return grad_parameters if asked.wants else []
    first_of_each = grad_parameters[:: len(asked.form.names)]
    count, shape = request.batch * request.steps, (request.batch, request.steps)
    return [grad.t()[:count].unflatten(0, shape) for grad in first_of_each]


# Folding --------------------------------------------------------------------------------------------------------------


def _axes(form: Form, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> list[int | None]:
    """Return for each tensor of a request along which axis its rows lie, not counting that along which it is mapped."""
    axes: list[int | None] = [1, *[0] * form.states, *[None] * (form.differentiable - 1 - form.states)]
    for mask, dim in list(zip(tensors, dims, strict=True))[len(axes) : -3]:
        rank = 0 if mask is None else mask.dim() - (dim is not None)
        axes.append({0: None, 2: 0, 3: 1}[rank])
    return [*axes, 0, 1, None]  # lengths, reset, batch sizes


def _fold(
    run: Callable[..., tuple[Tensor, ...]],
    count: int,
    tensors: Sequence[Tensor | None],
    dims: Sequence[int | None],
    axes: Sequence[int | None],
    made: Sequence[int],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run with what is mapped folded into the batch, in front of its rows; return what comes, and where it is mapped.

    What isn't mapped is copied for each, for so many at a time that the copies don't take much memory.

    Args:
        run: What the folded tensors are given to.
        count: How many are mapped.
        tensors: Each mapped along one of its axes, or not.
        dims: That axis, or `None`.
        axes: Along which axis each has its rows, when it isn't mapped; `None` for no rows.
        made: The same for what `run` returns; what it returns beyond these has its rows along axis 1.
    """
    given = list(zip(tensors, dims, axes, strict=True))
    copied = sum(t.nbytes for t, dim, axis in given if t is not None and dim is None and axis is not None)
    most = max(1, _COPIES // max(1, copied))
    parts, where = [], tuple(made)
    for begin in range(0, count, most):
        size = min(most, count - begin)
        results = run(*(_with_rows_of(t, dim, axis, begin, size) for t, dim, axis in given))
        where = (*made, *[1] * (len(results) - len(made)))
        parts.append([_parts(r, axis, size) for r, axis in zip(results, where, strict=True)])
    if len(parts) == 1:
        return tuple(parts[0]), where
    return tuple(torch.cat(part, axis) for part, axis in zip(zip(*parts, strict=True), where, strict=True)), where


def _with_rows_of(tensor: Tensor | None, dim: int | None, axis: int | None, begin: int, size: int) -> Tensor | None:
    """Return a tensor whose rows are those of so many of what is mapped."""
    if tensor is None or (axis is None and dim is None):
        return tensor
    if dim is None or axis is None:
        if dim is not None:  # a parameter's copies
            return tensor.narrow(dim, begin, size).movedim(dim, 0)
        assert axis is not None
        rows = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        rows = tensor.narrow(dim, begin, size).movedim(dim, axis)
    return rows.flatten(axis, axis + 1)
