"""The gated recurrent unit, in both published forms.

    r, z = σ(W_{r,z} x_t + b_{r,z} + U_{r,z} h_{t−1} + c_{r,z})      reset and update gate
    h_t  = (1 − z) ⊙ n + z ⊙ h_{t−1}

`reset_after=True`, torch's and cuDNN's: the reset gate acts after the product,

    n = tanh(W_n x_t + b_n + r ⊙ (U_n h_{t−1} + c_n))

`reset_after=False`, Cho et al. (2014) and the textbooks: before it,

    n = tanh(W_n x_t + b_n + U_n (r ⊙ h_{t−1}) + c_n)

W and b are `weight_ih` and `bias_ih`, U and c are `weight_hh` and `bias_hh`, cut in three: r, z, n.

With layer normalisation (Ba et al., 2016; `gain_ih`, `gain_hh` there), LN(W x_t; gain_ih) stands for W x_t and, over all of its
three parts, LN(U h_{t−1}; gain_hh) for U h_{t−1}. With the reset gate before the product U_n has a product, and so an LN, of its
own: over U_{r,z} h_{t−1}, and over U_n (r ⊙ h_{t−1}).

With recurrent dropout, h_{t−1} is what U meets; the h_{t−1} that z keeps is never dropped.

Backward, from ∂h_t:

    ∂n = ∂h_t ⊙ (1 − z)               ∂a_n = ∂n ⊙ (1 − n²)
    ∂z = ∂h_t ⊙ (h_{t−1} − n)         ∂a_z = ∂z ⊙ z(1−z)
    after:   ∂r = ∂a_n ⊙ (U_n h_{t−1} + c_n)       ∂a_r = ∂r ⊙ r(1−r)
             ∂h_{t−1} = ∂h_t ⊙ z + Uᵀ [∂a_r, ∂a_z, ∂a_n ⊙ r]
    before:  ∂v = U_nᵀ ∂a_n  with  v = r ⊙ h_{t−1}    ∂r = ∂v ⊙ h_{t−1}
             ∂h_{t−1} = ∂h_t ⊙ z + ∂v ⊙ r + U_{r,z}ᵀ [∂a_r, ∂a_z]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.cells.cell import (
    Linearised,
    StepGradient,
    affine,
    affine_backward,
    cut_recurrent,
    drop,
    joined,
    stacked,
)
from throughtime.shapes import StepHidden, StepInput
from throughtime.spec import Parameters


class Saved(NamedTuple):
    """What `step_backward` needs of a step; `u` is U_n h_{t−1} + c_n (reset after)."""

    x: StepInput
    h_prev: StepHidden
    r: StepHidden
    z: StepHidden
    n: StepHidden
    u: StepHidden


def step(
    x: StepInput, state: tuple[StepHidden], parameters: Parameters, recurrent_dropout: StepHidden | None = None
) -> tuple[tuple[StepHidden], Saved]:
    """Advance one step with the reset gate after the product: the state (h_{t−1},) becomes (h_t,)."""
    (h_prev,) = state
    p = parameters
    x_r, x_z, x_n = affine(x, p.weight_ih, p.bias_ih, p.gain_ih).chunk(3, dim=1)
    u_r, u_z, u = affine(drop(h_prev, recurrent_dropout), p.weight_hh, p.bias_hh, p.gain_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + r * u)
    h = (1 - z) * n + z * h_prev
    return (h,), Saved(x, h_prev, r, z, n, u)


def step_backward(
    grad_state: tuple[StepHidden],
    saved: Saved,
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
) -> StepGradient:
    """Carry ∂h_t back over `step`."""
    (grad_h,) = grad_state
    x, h_prev, r, z, n, u = saved
    p = parameters
    grad_a_n = grad_h * (1 - z) * (1 - n * n)
    grad_a_z = grad_h * (h_prev - n) * z * (1 - z)
    grad_a_r = grad_a_n * u * r * (1 - r)

    grad_a_ih = torch.cat([grad_a_r, grad_a_z, grad_a_n], dim=1)
    grad_a_hh = torch.cat([grad_a_r, grad_a_z, grad_a_n * r], dim=1)
    through_ih = affine_backward(grad_a_ih, x, p.weight_ih, p.bias_ih, p.gain_ih)
    through_hh = affine_backward(grad_a_hh, drop(h_prev, recurrent_dropout), p.weight_hh, p.bias_hh, p.gain_hh)
    return StepGradient(
        through_ih.x, (grad_h * z + drop(through_hh.x, recurrent_dropout),), joined(through_ih, through_hh)
    )


def recurrent_factors(
    grad_a: Tensor, columns_of_w: Callable[[slice], Tensor], h_in: StepHidden, parameters: Parameters
) -> list[tuple[Tensor, StepHidden]]:
    """Return (∂u, h) with u = U h + c, from the gradient ∂a at W x + b: ∂u = (∂a_r, ∂a_z, ∂a_n ⊙ r)."""
    r = _reset_gate(columns_of_w, h_in, parameters)
    of_rz, of_n = grad_a.split([2 * r.shape[1], r.shape[1]], dim=1)
    return [(torch.cat([of_rz, of_n * r], dim=1), h_in)]


def linearise(saved: Saved) -> Linearised:
    """Return `step_backward`'s factors. With the reset gate before the product there are none: two products follow each other."""
    _, h_prev, r, z, n, u = saved
    to_a_n = (1 - z) * (1 - n * n)
    to_a_z = (h_prev - n) * z * (1 - z)
    to_a_r = to_a_n * u * r * (1 - r)
    recurrent = torch.stack([to_a_r, to_a_z, to_a_n * r], dim=1)
    return Linearised((recurrent,), (torch.stack([to_a_r, to_a_z, to_a_n], dim=1),), ((z,),))


class SavedResetBefore(NamedTuple):
    """What `step_reset_before_backward` needs of a step."""

    x: StepInput
    h_prev: StepHidden
    r: StepHidden
    z: StepHidden
    n: StepHidden


def step_reset_before(
    x: StepInput, state: tuple[StepHidden], parameters: Parameters, recurrent_dropout: StepHidden | None = None
) -> tuple[tuple[StepHidden], SavedResetBefore]:
    """Advance one step with the reset gate before the product: the state (h_{t−1},) becomes (h_t,)."""
    (h_prev,) = state
    p = parameters
    h_in = drop(h_prev, recurrent_dropout)
    of_rz, of_n = cut_recurrent(p, 2 * h_prev.shape[1])
    x_r, x_z, x_n = affine(x, p.weight_ih, p.bias_ih, p.gain_ih).chunk(3, dim=1)
    u_r, u_z = affine(h_in, *of_rz).chunk(2, dim=1)
    r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + affine(r * h_in, *of_n))
    h = (1 - z) * n + z * h_prev
    return (h,), SavedResetBefore(x, h_prev, r, z, n)


def step_reset_before_backward(
    grad_state: tuple[StepHidden],
    saved: SavedResetBefore,
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
) -> StepGradient:
    """Carry ∂h_t back over `step_reset_before`."""
    (grad_h,) = grad_state
    x, h_prev, r, z, n = saved
    p = parameters
    h_in = drop(h_prev, recurrent_dropout)
    of_rz, of_n = cut_recurrent(p, 2 * h_prev.shape[1])
    grad_a_n = grad_h * (1 - z) * (1 - n * n)
    grad_a_z = grad_h * (h_prev - n) * z * (1 - z)
    through_n = affine_backward(grad_a_n, r * h_in, *of_n)
    grad_v = through_n.x
    grad_a_r = grad_v * h_in * r * (1 - r)

    grad_a_rz = torch.cat([grad_a_r, grad_a_z], dim=1)
    through_rz = affine_backward(grad_a_rz, h_in, *of_rz)
    through_ih = affine_backward(torch.cat([grad_a_rz, grad_a_n], dim=1), x, p.weight_ih, p.bias_ih, p.gain_ih)
    through_hh = stacked(grad_v * r + through_rz.x, through_rz, through_n)
    return StepGradient(
        through_ih.x, (grad_h * z + drop(through_hh.x, recurrent_dropout),), joined(through_ih, through_hh)
    )


def recurrent_factors_reset_before(
    grad_a: Tensor, columns_of_w: Callable[[slice], Tensor], h_in: StepHidden, parameters: Parameters
) -> list[tuple[Tensor, StepHidden]]:
    """Return (∂u, v) of both products: U_{r,z} meets h, and U_n meets r ⊙ h; at both the gradient is that at W x + b."""
    r = _reset_gate(columns_of_w, h_in, parameters)
    of_rz, of_n = grad_a.split([2 * r.shape[1], r.shape[1]], dim=1)
    return [(of_rz, h_in), (of_n, r * h_in)]


def _reset_gate(columns_of_w: Callable[[slice], Tensor], h_in: StepHidden, parameters: Parameters) -> StepHidden:
    rows = parameters.weight_hh.shape[0] // 3
    of_r, _ = cut_recurrent(parameters, rows)
    return torch.sigmoid(columns_of_w(slice(rows)) + affine(h_in, *of_r))
