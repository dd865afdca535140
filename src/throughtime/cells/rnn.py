"""The simple recurrent network (Elman, 1990).

    a_t = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh
    h_t = tanh(a_t)        or   max(a_t, 0)

Backward, from ∂h_t, the gradient that reaches h_t from its loss and from all later steps:

    ∂a_t     = ∂h_t ⊙ (1 − h_t²)        or   ∂h_t ⊙ [h_t > 0]
    ∂h_{t−1} = W_hhᵀ ∂a_t

With layer normalisation (Ba et al., 2016; `gain_ih`, `gain_hh` there):

    a_t = LN(W_ih x_t; gain_ih) + b_ih + LN(W_hh h_{t−1}; gain_hh) + b_hh

The same W_hh at every step: their product over many steps vanishes or explodes (Bengio et al., 1994;
Pascanu et al., 2013).
"""

from typing import NamedTuple

import torch

from throughtime.cells.cell import Linearised, StepGradient, affine, affine_backward, drop, joined
from throughtime.shapes import StepHidden, StepInput
from throughtime.spec import Parameters


class Saved(NamedTuple):
    """What `step_backward` needs of a step."""

    x: StepInput
    h_prev: StepHidden
    h: StepHidden


def step(
    x: StepInput,
    state: tuple[StepHidden],
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
    *,
    nonlinearity: str = "tanh",
) -> tuple[tuple[StepHidden], Saved]:
    """Advance one step: the state (h_{t−1},) becomes (h_t,). `nonlinearity` is "tanh" or "relu"."""
    (h_prev,) = state
    p = parameters
    a = affine(x, p.weight_ih, p.bias_ih, p.gain_ih)
    a = a + affine(drop(h_prev, recurrent_dropout), p.weight_hh, p.bias_hh, p.gain_hh)
    h = torch.tanh(a) if nonlinearity == "tanh" else torch.relu(a)
    return (h,), Saved(x, h_prev, h)


def step_backward(
    grad_state: tuple[StepHidden],
    saved: Saved,
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
    *,
    nonlinearity: str = "tanh",
) -> StepGradient:
    """Carry ∂h_t back over the step: to x_t, to h_{t−1}, and to the weights."""
    (grad_h,) = grad_state
    x, h_prev, h = saved
    grad_a = grad_h * (1 - h * h) if nonlinearity == "tanh" else grad_h * (h > 0)

    p = parameters
    through_ih = affine_backward(grad_a, x, p.weight_ih, p.bias_ih, p.gain_ih)
    through_hh = affine_backward(grad_a, drop(h_prev, recurrent_dropout), p.weight_hh, p.bias_hh, p.gain_hh)
    return StepGradient(through_ih.x, (drop(through_hh.x, recurrent_dropout),), joined(through_ih, through_hh))


def linearise(saved: Saved, *, nonlinearity: str = "tanh") -> Linearised:
    """Return `step_backward`'s factors: ∂a_t = ∂h_t ⊙ (1 − h_t²), or ∂h_t ⊙ [h_t > 0]."""
    h = saved.h
    to_a = ((1 - h * h) if nonlinearity == "tanh" else (h > 0).to(h.dtype))[:, None]
    return Linearised((to_a,), None, ((None,),))
