"""A cell through time, forward and backward: the plain time loop.

Forward, s_t = step(x_t, s_{t−1}). Backward (backpropagation through time: Rumelhart et al., 1986; Werbos, 1990), from
the last step to the first, carrying ∂s:

    ∂s_t ← ∂s_t + ∂L_t/∂s_t                           the step's own loss joins what comes from later steps
    ∂x_t, ∂s_{t−1}, ∂W at step t = step_backward(∂s_t)
    ∂W = Σ_t ∂W at step t                             the same weights serve every step, so their gradients add up

With zoneout (Krueger et al., 2017) a part of the state keeps its old value, where a mask k of zeros and ones says so, separately
for h and c; in place of the mask its expectation may stand. step sees none of it:

    s̃_t = step(x_t, s_{t−1}),    s_t = k ⊙ s_{t−1} + (1 − k) ⊙ s̃_t
    ∂s̃_t = (1 − k) ⊙ ∂s_t,       ∂s_{t−1}  gains  k ⊙ ∂s_t

With recurrent dropout (Gal & Ghahramani, 2016) one mask for the whole sequence multiplies h_{t−1} as it enters W_hh.

Both differentiate again: they are plain torch, so autograd can go through them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.cells.cell import Cell, StepGradient
from throughtime.shapes import Inputs, Lengths, Outputs, Reset, StepState
from throughtime.spec import NO_MASKS, Masks, Parameters


class SequenceResult(NamedTuple):
    """A forward pass: outputs h_t (T, B, P), the final state, and what each step saved, in order of t."""

    outputs: Outputs
    final_state: StepState
    saved: list[tuple[Tensor, ...]]


class SequenceGradient(NamedTuple):
    """A backward pass: gradients for the inputs (T, B, I), the initial state and the parameters."""

    inputs: Inputs
    initial_state: StepState
    parameters: Parameters


def forward(
    cell: Cell,
    inputs: Inputs,
    initial_state: StepState,
    parameters: Parameters,
    lengths: Lengths | None = None,
    reset: Reset | None = None,
    reverse: bool = False,
    *,
    masks: Masks = NO_MASKS,
) -> SequenceResult:
    """Run `cell` over a sequence.

    Args:
        cell: One of `throughtime.cells.CELLS`.
        inputs: x, (T, B, I).
        initial_state: (h_0,) or (h_0, c_0), each (B, ·).
        parameters: The layer's weights.
        lengths: Steps in each row (B,), 0 ≤ length ≤ T; `None` means T. Outputs after a row's end are zero, and its
            state stays as it was there.
        reset: (T, B); where true a new sequence begins at that step: it starts from `initial_state`.
        reverse: Run from the last step to the first.
        masks: What zoneout keeps and recurrent dropout drops.

    Example:
        >>> import torch
        >>> from throughtime.cells import CELLS, Parameters, sequence
        >>> x = torch.eye(5)[:, None]  # five one-hot letters: T = 5, B = 1, I = 5
        >>> weights = Parameters(weight_ih=torch.ones(3, 5), weight_hh=torch.eye(3))
        >>> result = sequence.forward(CELLS["rnn_tanh"], x, (torch.zeros(1, 3),), weights)
        >>> result.outputs.shape  # h_t = tanh(W_xh x_t + W_hh h_{t−1}) for each t
        torch.Size([5, 1, 3])
    """
    state = initial_state
    steps = inputs.shape[0]
    begins = beginnings(reset, lengths, reverse)
    if lengths is not None:  # what stands in the padding must not matter, not even a NaN
        inputs = torch.where(is_active(lengths, steps)[:, :, None], inputs, 0)
    outputs: list[Tensor] = [inputs] * steps
    saved: list[tuple[Tensor, ...]] = [()] * steps
    for t in _order(steps, reverse):
        before = state if begins is None else _choose(begins[t], initial_state, state)
        after, saved[t] = cell.step(inputs[t], before, parameters, masks.recurrent_dropout)
        after = _zone(masks, t, before, after)
        if lengths is None:
            state, outputs[t] = after, after[0]
        else:
            active = t < lengths
            state = _choose(active, after, state)
            outputs[t] = torch.where(active[:, None], after[0], 0)
    return SequenceResult(torch.stack(outputs), state, saved)


def backward(
    cell: Cell,
    grad_outputs: Outputs,
    grad_final: StepState,
    saved: list[tuple[Tensor, ...]],
    parameters: Parameters,
    lengths: Lengths | None = None,
    reset: Reset | None = None,
    reverse: bool = False,
    *,
    masks: Masks = NO_MASKS,
) -> SequenceGradient:
    """Backpropagate through time.

    Args:
        cell: As in `forward`.
        grad_outputs: ∂L_t/∂h_t for every step's own loss, (T, B, P).
        grad_final: Gradient of the final state, shaped like it.
        saved: What `forward` saved.
        parameters: As in `forward`.
        lengths: As in `forward`.
        reset: As in `forward`.
        reverse: As in `forward`.
        masks: As in `forward`.
    """
    grad_state = grad_final
    grad_initial = tuple(torch.zeros_like(g) for g in grad_final)
    grad_parameters = parameters.zeros()
    steps = grad_outputs.shape[0]
    begins = beginnings(reset, lengths, reverse)
    grad_inputs: list[Tensor] = [grad_outputs] * steps
    for t in reversed(_order(steps, reverse)):
        gradient = _step_backward(cell, grad_outputs[t], grad_state, saved[t], parameters, lengths, t, masks)
        grad_inputs[t] = gradient.x
        grad_state = gradient.state
        grad_parameters = grad_parameters.plus(gradient.parameters)  # ∂L/∂W = Σ_t
        if begins is not None:
            nothing = tuple(torch.zeros_like(g) for g in grad_state)
            grad_initial = _plus(grad_initial, _choose(begins[t], grad_state, nothing))
            grad_state = _choose(begins[t], nothing, grad_state)
    return SequenceGradient(torch.stack(grad_inputs), _plus(grad_initial, grad_state), grad_parameters)


def _step_backward(
    cell: Cell,
    grad_output: Tensor,
    grad_state: StepState,
    saved: tuple[Tensor, ...],
    parameters: Parameters,
    lengths: Lengths | None,
    t: int,
    masks: Masks,
) -> StepGradient:
    """Join the step's own loss to what comes from later steps and carry both over it; ended rows only pass on."""
    grad_h, *rest = grad_state
    active = None if lengths is None else t < lengths
    grad_after: StepState = (grad_h + grad_output, *rest)
    if active is not None:
        grad_after = _choose(active, grad_after, tuple(torch.zeros_like(g) for g in grad_state))
    grad_kept, grad_new = _zone_backward(masks, t, grad_after)
    gradient = cell.step_backward(grad_new, saved, parameters, masks.recurrent_dropout)
    grad_before = tuple(g if kept is None else kept + g for kept, g in zip(grad_kept, gradient.state, strict=True))
    return gradient._replace(state=grad_before if active is None else _choose(active, grad_before, grad_state))


def _zone(masks: Masks, t: int, before: StepState, after: StepState) -> StepState:
    """Return s_t = k ⊙ s_{t−1} + (1 − k) ⊙ s̃_t."""
    shares = [_share(zoneout, t, s) for zoneout, s in zip(masks, after)]  # noqa: B905 (h,) or (h, c)
    return tuple(
        new if k is None else k * old + (1 - k) * new for k, old, new in zip(shares, before, after, strict=True)
    )


def _zone_backward(masks: Masks, t: int, grad: StepState) -> tuple[list[Tensor | None], StepState]:
    """Return ∂s_t's part k ⊙ ∂s_t for s_{t−1}, `None` without zoneout, and (1 − k) ⊙ ∂s_t for s̃_t."""
    shares = [_share(zoneout, t, g) for zoneout, g in zip(masks, grad)]  # noqa: B905 (h,) or (h, c)
    return (
        [None if k is None else k * g for k, g in zip(shares, grad, strict=True)],
        tuple(g if k is None else (1 - k) * g for k, g in zip(shares, grad, strict=True)),
    )


def _share(zoneout: Tensor | None, t: int, like: Tensor) -> Tensor | None:
    """Return k at step t."""
    if zoneout is None:
        return None
    return (zoneout if zoneout.dim() == 0 else zoneout[t]).to(like.dtype)


def _order(steps: int, reverse: bool) -> list[int]:
    return list(range(steps - 1, -1, -1)) if reverse else list(range(steps))


def beginnings(reset: Reset | None, lengths: Lengths | None, reverse: bool) -> Reset | None:
    """Return where the state starts anew. A boundary before step t is met, in reverse, before step t−1."""
    if reset is None:
        return None
    if reverse:
        reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    if lengths is not None:
        reset = reset & is_active(lengths, reset.shape[0])
    return reset


def is_active(lengths: Lengths, steps: int) -> Reset:
    """Return which steps lie within each row's length, (T, B)."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def _choose(condition: Tensor, yes: StepState, no: StepState) -> StepState:
    """Choose row by row."""
    return tuple(torch.where(condition[:, None], a, b) for a, b in zip(yes, no, strict=True))


def _plus(a: StepState, b: StepState) -> StepState:
    return tuple(p + q for p, q in zip(a, b, strict=True))
