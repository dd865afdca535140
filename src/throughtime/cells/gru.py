"""The gated recurrent unit, in both published forms.

    r, z = σ(W_{r,z} x_t + b_{r,z} + U_{r,z} h_{t−1} + c_{r,z})      reset and update gate
    h_t  = (1 − z) ⊙ n + z ⊙ h_{t−1}

`reset_after=True`, torch's and cuDNN's: the reset gate acts after the product,

    n = tanh(W_n x_t + b_n + r ⊙ (U_n h_{t−1} + c_n))

`reset_after=False`, Cho et al. (2014) and the textbooks: before it,

    n = tanh(W_n x_t + b_n + U_n (r ⊙ h_{t−1}) + c_n)

W and b are `weight_ih` and `bias_ih`, U and c are `weight_hh` and `bias_hh`, cut in three: r, z, n.

Backward, from ∂h_t:

    ∂n = ∂h_t ⊙ (1 − z)               ∂a_n = ∂n ⊙ (1 − n²)
    ∂z = ∂h_t ⊙ (h_{t−1} − n)         ∂a_z = ∂z ⊙ z(1−z)
    after:   ∂r = ∂a_n ⊙ (U_n h_{t−1} + c_n)       ∂a_r = ∂r ⊙ r(1−r)
             ∂h_{t−1} = ∂h_t ⊙ z + Uᵀ [∂a_r, ∂a_z, ∂a_n ⊙ r]
    before:  ∂v = U_nᵀ ∂a_n  with  v = r ⊙ h_{t−1}    ∂r = ∂v ⊙ h_{t−1}
             ∂h_{t−1} = ∂h_t ⊙ z + ∂v ⊙ r + U_{r,z}ᵀ [∂a_r, ∂a_z]
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from throughtime.cells.cell import Linearised, Parameters, StepGradient, affine_backward
from throughtime.shapes import StepHidden, StepInput


class Saved(NamedTuple):
    """What `step_backward` needs of a step; `u` is U_n h_{t−1} + c_n (reset after)."""

    x: StepInput
    h_prev: StepHidden
    r: StepHidden
    z: StepHidden
    n: StepHidden
    u: StepHidden


def step(x: StepInput, state: tuple[StepHidden], parameters: Parameters) -> tuple[tuple[StepHidden], Saved]:
    """Advance one step with the reset gate after the product: the state (h_{t−1},) becomes (h_t,)."""
    (h_prev,) = state
    x_r, x_z, x_n = linear(x, parameters.weight_ih, parameters.bias_ih).chunk(3, dim=1)
    u_r, u_z, u = linear(h_prev, parameters.weight_hh, parameters.bias_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + r * u)
    h = (1 - z) * n + z * h_prev
    return (h,), Saved(x, h_prev, r, z, n, u)


def step_backward(grad_state: tuple[StepHidden], saved: Saved, parameters: Parameters) -> StepGradient:
    """Carry ∂h_t back over `step`."""
    (grad_h,) = grad_state
    x, h_prev, r, z, n, u = saved
    grad_a_n = grad_h * (1 - z) * (1 - n * n)
    grad_a_z = grad_h * (h_prev - n) * z * (1 - z)
    grad_a_r = grad_a_n * u * r * (1 - r)

    grad_a_ih = torch.cat([grad_a_r, grad_a_z, grad_a_n], dim=1)
    grad_a_hh = torch.cat([grad_a_r, grad_a_z, grad_a_n * r], dim=1)
    grad_x, grad_weight_ih, grad_bias_ih = affine_backward(grad_a_ih, x, parameters.weight_ih, parameters.bias_ih)
    grad_h_prev, grad_weight_hh, grad_bias_hh = affine_backward(
        grad_a_hh, h_prev, parameters.weight_hh, parameters.bias_hh
    )
    return StepGradient(
        grad_x,
        (grad_h * z + grad_h_prev,),
        Parameters(grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh),
    )


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
    x: StepInput, state: tuple[StepHidden], parameters: Parameters
) -> tuple[tuple[StepHidden], SavedResetBefore]:
    """Advance one step with the reset gate before the product: the state (h_{t−1},) becomes (h_t,)."""
    (h_prev,) = state
    weight_rz, weight_n, bias_rz, bias_n = _split_recurrent(parameters)
    x_r, x_z, x_n = linear(x, parameters.weight_ih, parameters.bias_ih).chunk(3, dim=1)
    u_r, u_z = linear(h_prev, weight_rz, bias_rz).chunk(2, dim=1)
    r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
    n = torch.tanh(x_n + linear(r * h_prev, weight_n, bias_n))
    h = (1 - z) * n + z * h_prev
    return (h,), SavedResetBefore(x, h_prev, r, z, n)


def step_reset_before_backward(
    grad_state: tuple[StepHidden], saved: SavedResetBefore, parameters: Parameters
) -> StepGradient:
    """Carry ∂h_t back over `step_reset_before`."""
    (grad_h,) = grad_state
    x, h_prev, r, z, n = saved
    weight_rz, weight_n, bias_rz, bias_n = _split_recurrent(parameters)
    grad_a_n = grad_h * (1 - z) * (1 - n * n)
    grad_a_z = grad_h * (h_prev - n) * z * (1 - z)
    grad_v, grad_weight_n, grad_bias_n = affine_backward(grad_a_n, r * h_prev, weight_n, bias_n)
    grad_a_r = grad_v * h_prev * r * (1 - r)

    grad_a_rz = torch.cat([grad_a_r, grad_a_z], dim=1)
    grad_h_prev, grad_weight_rz, grad_bias_rz = affine_backward(grad_a_rz, h_prev, weight_rz, bias_rz)
    grad_x, grad_weight_ih, grad_bias_ih = affine_backward(
        torch.cat([grad_a_rz, grad_a_n], dim=1), x, parameters.weight_ih, parameters.bias_ih
    )
    grad_bias_hh = None
    if grad_bias_rz is not None and grad_bias_n is not None:
        grad_bias_hh = torch.cat([grad_bias_rz, grad_bias_n])
    return StepGradient(
        grad_x,
        (grad_h * z + grad_v * r + grad_h_prev,),
        Parameters(grad_weight_ih, torch.cat([grad_weight_rz, grad_weight_n]), grad_bias_ih, grad_bias_hh),
    )


def _split_recurrent(parameters: Parameters) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cut U and c into the rows of r and z, and the rows of n."""
    rows = 2 * (parameters.weight_hh.shape[0] // 3)
    weight, bias = parameters.weight_hh, parameters.bias_hh
    return weight[:rows], weight[rows:], None if bias is None else bias[:rows], None if bias is None else bias[rows:]
