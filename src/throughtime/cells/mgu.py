"""The minimal gated unit (Zhou et al., 2016): a GRU whose one gate both forgets and chooses what the candidate sees.

    f    = σ(W_f x_t + b_f + U_f h_{t−1} + c_f)
    n    = tanh(W_n x_t + b_n + U_n (f ⊙ h_{t−1}) + c_n)
    h_t  = (1 − f) ⊙ h_{t−1} + f ⊙ n

W and b are `weight_ih` and `bias_ih`, U and c are `weight_hh` and `bias_hh`, cut in two: f, n.

With layer normalisation (Ba et al., 2016; `gain_ih`, `gain_hh` there), LN(W x_t; gain_ih) stands for W x_t, over both of its parts;
U_f h_{t−1} and U_n (f ⊙ h_{t−1}) are two products, and each has an LN of its own.

With recurrent dropout, h_{t−1} is what U meets; the h_{t−1} that f lets by is never dropped.

Backward, from ∂h_t, with v = f ⊙ h_{t−1}:

    ∂n = ∂h_t ⊙ f                     ∂a_n = ∂n ⊙ (1 − n²)        ∂v = U_nᵀ ∂a_n
    ∂f = ∂h_t ⊙ (n − h_{t−1}) + ∂v ⊙ h_{t−1}                      ∂a_f = ∂f ⊙ f(1−f)
    ∂h_{t−1} = ∂h_t ⊙ (1 − f) + ∂v ⊙ f + U_fᵀ ∂a_f
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.cells.cell import StepGradient, affine, affine_backward, cut_recurrent, drop, joined, stacked
from throughtime.shapes import StepHidden, StepInput
from throughtime.spec import Parameters


class Saved(NamedTuple):
    """What `step_backward` needs of a step."""

    x: StepInput
    h_prev: StepHidden
    f: StepHidden
    n: StepHidden


def step(
    x: StepInput, state: tuple[StepHidden], parameters: Parameters, recurrent_dropout: StepHidden | None = None
) -> tuple[tuple[StepHidden], Saved]:
    """Advance one step: the state (h_{t−1},) becomes (h_t,)."""
    (h_prev,) = state
    p = parameters
    h_in = drop(h_prev, recurrent_dropout)
    of_f, of_n = cut_recurrent(p, h_prev.shape[1])
    x_f, x_n = affine(x, p.weight_ih, p.bias_ih, p.gain_ih).chunk(2, dim=1)
    f = torch.sigmoid(x_f + affine(h_in, *of_f))
    n = torch.tanh(x_n + affine(f * h_in, *of_n))
    h = (1 - f) * h_prev + f * n
    return (h,), Saved(x, h_prev, f, n)


def step_backward(
    grad_state: tuple[StepHidden],
    saved: Saved,
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
) -> StepGradient:
    """Carry ∂h_t back over `step`."""
    (grad_h,) = grad_state
    x, h_prev, f, n = saved
    p = parameters
    h_in = drop(h_prev, recurrent_dropout)
    of_f, of_n = cut_recurrent(p, h_prev.shape[1])
    grad_a_n = grad_h * f * (1 - n * n)
    through_n = affine_backward(grad_a_n, f * h_in, *of_n)
    grad_v = through_n.x
    grad_a_f = (grad_h * (n - h_prev) + grad_v * h_in) * f * (1 - f)

    through_f = affine_backward(grad_a_f, h_in, *of_f)
    through_ih = affine_backward(torch.cat([grad_a_f, grad_a_n], dim=1), x, p.weight_ih, p.bias_ih, p.gain_ih)
    through_hh = stacked(grad_v * f + through_f.x, through_f, through_n)
    return StepGradient(
        through_ih.x, (grad_h * (1 - f) + drop(through_hh.x, recurrent_dropout),), joined(through_ih, through_hh)
    )


def recurrent_factors(
    grad_a: Tensor, columns_of_w: Callable[[slice], Tensor], h_in: StepHidden, parameters: Parameters
) -> list[tuple[Tensor, StepHidden]]:
    """Return (∂u, v) of both products: U_f meets h, and U_n meets f ⊙ h; at both the gradient is that at W x + b."""
    rows = h_in.shape[1]
    of_f, _ = cut_recurrent(parameters, rows)
    f = torch.sigmoid(columns_of_w(slice(rows)) + affine(h_in, *of_f))
    grad_a_f, grad_a_n = grad_a.chunk(2, dim=1)
    return [(grad_a_f, h_in), (grad_a_n, f * h_in)]
