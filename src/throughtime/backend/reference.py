"""The backend of the equations: `throughtime.cells`, step by step in plain torch; the only one that sees them.

It computes below the operator, as the others do, and above it ("openly"), where whatever transforms torch's operators sees each of
them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from throughtime import watching
from throughtime.arguments import check_token_ids
from throughtime.cells import find, sequence
from throughtime.request import Direction, Gradient, Request, Result, check, check_backward, check_kinds, split
from throughtime.shapes import StepState
from throughtime.spec import Parameters


def refusal(request: Request) -> str | None:
    """Return why the equations can't serve a request, or `None` where they can."""
    if len(request.directions) > 1:
        name = request.spec.name
        return f"they run a {name} one way at a time, and bidirectional is true; call it with reverse false and true"
    return None


def forward(request: Request, keep: bool) -> Result:
    """Compute a layer in one direction; `saved` is empty unless `keep`, which says that a backward pass will follow."""
    _check(request)
    (direction,) = request.directions
    result = _run(request, direction)
    is_kept = keep and not request.recompute_every
    saved = [torch.stack(field) for field in zip(*result.saved, strict=True)] if is_kept else []
    # An operator's outputs must not alias its inputs, and an all-empty batch would hand the initial state through.
    return Result(_packed(request, result.outputs), [s.clone() for s in result.final_state], saved)


def backward(
    request: Request,
    grad_output: Tensor,
    grad_final: Sequence[Tensor],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool = True,
) -> Gradient:
    """Backpropagate through time: gradients of the input (`None` if not needed), the initial state and the parameters."""
    _check(request)
    (direction,) = request.directions
    cell, (_, fields) = find(request.spec.name), first_step(request, direction)
    kept = [] if request.recompute_every else [((request.steps, *field.shape), output.dtype) for field in fields]
    check_backward(request, grad_output, grad_final, output, saved, kept)
    if request.recompute_every:  # a layer at once: the equations keep no state to start again from
        steps = _run(request, direction).saved
    else:
        steps = [cell.saved(*fields) for fields in zip(*saved, strict=True)]
    gradient = _backpropagate(request, direction, grad_output, grad_final, steps)
    grad_input = _packed(request, gradient.inputs) if needs_input else None
    grad_parameters = _cast(gradient.parameters.to_list(), direction.parameters.weight_ih.dtype)
    return Gradient(grad_input, [g.clone() for g in gradient.initial_state], grad_parameters)


def fake_saved(request: Request) -> list[Tensor]:
    """Return tensors like those that `forward` saves, for a request whose tensors have no values."""
    if request.recompute_every:
        return []
    (direction,) = request.directions
    return [field.new_empty((request.steps, *field.shape)) for field in first_step(request, direction)[1]]


def first_step(request: Request, direction: Direction) -> tuple[StepState, tuple[Tensor, ...]]:
    """Take a step from an input of any content: the state after it and what it saves tell every shape and dtype."""
    weights = _rounded(request, direction)
    x = weights.weight_ih.new_empty((direction.initial[0].shape[0], weights.weight_ih.shape[1]))
    return find(request.spec.name).step(x, direction.initial, weights)


def forward_openly(request: Request) -> Result:
    """Compute a layer above the operator."""
    results = [_run(request, direction) for direction in request.directions]
    outputs = [_packed(request, result.outputs) for result in results]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return Result(output, [state for result in results for state in result.final_state], [])


def backward_openly(request: Request, grad_output: Tensor, grad_final: Sequence[Tensor]) -> Gradient:
    """Backpropagate above the operator."""
    directions, dtype = request.directions, request.parameters[-1].dtype
    grads = grad_output.chunk(len(directions), -1)
    finals = split(grad_final, len(directions))
    gradients = []
    for direction, grad, final in zip(directions, grads, finals, strict=True):
        gradients.append(_backpropagate(request, direction, grad, final, _run(request, direction).saved))
    grad_input = torch.stack([gradient.inputs for gradient in gradients]).sum(0)
    grad_initial = [s for gradient in gradients for s in gradient.initial_state]
    grad_parameters = _cast([p for gradient in gradients for p in gradient.parameters.to_list()], dtype)
    return Gradient(_packed(request, grad_input), grad_initial, grad_parameters)


# A backward pass in two parts: back to the gates, where every row is by itself, and on to input and parameters, where rows are
# summed. Between them stands ∂a, the gradient at a = W_ih x + b_ih, (B, T, G·H) in each direction.


def tells_by_gates(request: Request) -> bool:
    """Whether ∂a tells the gradients of all parameters."""
    has_projection = request.directions[0].parameters.weight_hr is not None
    return request.batch_sizes is None and not has_projection and find(request.spec.name).recurrent_factors is not None


def backward_to_gates_openly(
    request: Request, grad_output: Tensor, grad_final: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Backpropagate above the operator: return ∂a of each direction and the gradient of the initial state."""
    grads, ways = grad_output.chunk(len(request.directions), -1), len(request.directions)
    grads_at_gates, grad_initial = [], []
    for direction, grad, final in zip(request.directions, grads, split(grad_final, ways), strict=True):
        a = _through_ih(request, direction, slice(None))
        parameters = direction.parameters._replace(
            weight_ih=torch.eye(a.shape[2], dtype=a.dtype, device=a.device), bias_ih=None
        )
        own = direction._replace(parameters=parameters)
        gradient = _backpropagate(request, own, grad, final, _run(request._replace(input=a), own).saved)
        grads_at_gates.append(gradient.inputs.transpose(0, 1))
        grad_initial += gradient.initial_state
    return grads_at_gates, grad_initial


def backward_from_gates(
    request: Request,
    grads_at_gates: Sequence[Tensor],
    output: Tensor,
    needs_input: bool,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of the input, unless nobody needs it, and of the parameters, above the operator.

    Args:
        request: What the forward pass was given.
        grads_at_gates: ∂a of each direction.
        output: What the forward pass returned.
        needs_input: Whether the input's gradient is wanted.
        multiply: aᵀ b of tensors (rows, ·).
    """
    grad_input, grad_parameters, cell = None, [], find(request.spec.name)
    assert cell.recurrent_factors is not None
    outputs = output.chunk(len(request.directions), -1)
    for direction, grad_a, own in zip(request.directions, grads_at_gates, outputs, strict=True):
        p, rows = direction.parameters, grad_a.flatten(0, 1)
        columns_of_w = partial(_columns_of_w, request, direction, dtype=rows.dtype)
        h_in = _by_row(_before(request, direction, own)).to(rows.dtype)
        factors = cell.recurrent_factors(rows, columns_of_w, h_in, p)
        grads = [_grad_weight_ih(request, p.weight_ih, rows, multiply), _joined([multiply(u, v) for u, v in factors])]
        if p.bias_ih is not None:
            grads += [rows.sum(0), _joined([u.sum(0) for u, _ in factors])]
        grad_parameters += _cast(grads, p.weight_ih.dtype)
        if needs_input:
            through = (grad_a @ p.weight_ih).transpose(0, 1).to(request.dtype)
            grad_input = through if grad_input is None else grad_input + through
    return grad_input, grad_parameters


def _by_row(steps: Tensor) -> Tensor:
    """(T, B, ·) to (B · T, ·), or ids (T, B) to (B · T,)."""
    return steps.transpose(0, 1).flatten(0, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _through_ih(request: Request, direction: Direction, rows: slice) -> Tensor:
    """Return those columns of W_ih x + b_ih, (T, B, ·)."""
    p, input = _rounded(request, direction), _without_padding(request, request.input)
    bias = None if p.bias_ih is None else p.bias_ih[rows]
    if not request.reads_ids:
        return linear(input, p.weight_ih[rows], bias)
    w = embedding(input, p.weight_ih[rows].t())
    return w if bias is None else w + bias


def _columns_of_w(request: Request, direction: Direction, columns: slice, dtype: torch.dtype) -> Tensor:
    return _by_row(_through_ih(request, direction, columns)).to(dtype)


def _without_padding(request: Request, input: Tensor) -> Tensor:
    """Return the input with zeros, of which any may come, where rows have ended."""
    if request.lengths is None:
        return input
    there = sequence.is_active(request.lengths, request.steps)
    return torch.where(there if request.reads_ids else there[:, :, None], input, 0)


def _before(request: Request, direction: Direction, output: Tensor) -> Tensor:
    """Return h_{t−1} as it enters W_hh, (T, B, P); of steps past a row's end anything."""
    initial, lengths, steps = direction.initial[0], request.lengths, request.steps
    if direction.reverse:
        before = torch.cat([output[1:], initial[None]])
        if lengths is not None:
            is_first = torch.arange(1, steps + 1, device=lengths.device)[:, None] >= lengths
            before = torch.where(is_first[:, :, None], initial, before)
    else:
        before = torch.cat([initial[None], output[:-1]])
    begins = sequence.beginnings(request.reset, lengths, direction.reverse)
    if begins is not None:
        before = torch.where(begins[:, :, None], initial, before)
    dropped = request.masks.recurrent_dropout
    return before if dropped is None else before * dropped


def _grad_weight_ih(
    request: Request, weight_ih: Tensor, rows: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    input = _by_row(_without_padding(request, request.input))
    if not request.reads_ids:
        return multiply(rows, input.to(rows.dtype))
    return rows.new_zeros(weight_ih.shape[::-1]).index_add(0, input, rows).t()


def _check(request: Request) -> None:
    if (reason := refusal(request)) is not None:
        raise NotImplementedError(f"backend 'reference' can't serve this request: {reason}")
    check_kinds(request)
    check(request)
    if request.input.shape[0] == 0:
        raise ValueError(f"input has shape {tuple(request.input.shape)}; expected at least one step")


def _run(request: Request, direction: Direction) -> sequence.SequenceResult:
    """Compute one direction, on padded arrays."""
    weights, lengths = _rounded(request, direction), _lengths(request)
    input = _padded(request, request.input)
    if not input.is_floating_point():
        input = _one_hot(input, weights.weight_ih, lengths)
    given = find(request.spec.name), input, direction.initial, weights, lengths, request.reset, direction.reverse
    return sequence.forward(*given, masks=request.masks)


def _backpropagate(
    request: Request,
    direction: Direction,
    grad_output: Tensor,
    grad_final: Sequence[Tensor],
    saved: list[tuple[Tensor, ...]],
) -> sequence.SequenceGradient:
    """Backpropagate through one direction, on padded arrays."""
    given = (
        find(request.spec.name),
        _padded(request, grad_output),
        tuple(grad_final),
        saved,
        _rounded(request, direction),
    )
    rest = _lengths(request), request.reset, direction.reverse
    return sequence.backward(*given, *rest, masks=request.masks)


def _rounded(request: Request, direction: Direction) -> Parameters:
    """Return the parameters in the dtype that is computed in."""
    parameters, dtype = direction.parameters, direction.initial[0].dtype
    return parameters._replace(**{name: p.to(dtype) for name, p in parameters.there().items()})


def _one_hot(ids: Tensor, weight_ih: Tensor, lengths: Tensor | None) -> Tensor:
    """Return ids as the equations read them (T, B, I), with id 0 in the padding."""
    if lengths is not None:
        ids = torch.where(sequence.is_active(lengths, ids.shape[0]), ids, 0)
    if watching.is_transformed() and not torch.compiler.is_compiling():  # what comes by the operator has been checked
        check_token_ids(watching.values(ids), weight_ih.shape[1])
    # torch's own one_hot looks at values, which some transforms don't let anybody do.
    return (ids[:, :, None] == torch.arange(weight_ih.shape[1], device=ids.device)).to(weight_ih.dtype)


# Packed rows (N, ·) stand step after step, the longest sequence first; the equations read padded ones (T, B, ·).


def _is_there(request: Request) -> Tensor:
    """Return which of packed rows there are, (T, B)."""
    assert request.batch_sizes is not None
    ranks = torch.arange(int(request.batch_sizes[0]), device=request.input.device)
    return ranks < request.batch_sizes.to(ranks.device)[:, None]


def _lengths(request: Request) -> Tensor | None:
    return request.lengths if request.batch_sizes is None else _is_there(request).sum(0)


def _padded(request: Request, rows: Tensor) -> Tensor:
    """Return padded rows, zero where there are none."""
    if request.batch_sizes is None:
        return rows
    is_there = _is_there(request)
    padded = rows.new_zeros((is_there.numel(), *rows.shape[1:]))
    index = is_there.flatten().nonzero()[:, 0]
    return padded.index_copy(0, index, rows).view(*is_there.shape, *rows.shape[1:])


def _packed(request: Request, rows: Tensor) -> Tensor:
    """Return rows of padded arrays as the request has its own."""
    if request.batch_sizes is None:
        return rows
    index = _is_there(request).flatten().nonzero()[:, 0]
    return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:]).index_select(
        0, index
    )  # batched gradients know no flatten


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]
