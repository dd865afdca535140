"""Long short-term memory (Hochreiter & Schmidhuber, 1997; forget gate: Gers et al., 2000).

    a_t = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh        cut in four: a_i, a_f, a_g, a_o
    i, f, o = σ(a_i), σ(a_f), σ(a_o)                   input, forget and output gate
    g = tanh(a_g)                                      candidate
    c_t = f ⊙ c_{t−1} + i ⊙ g
    m_t = o ⊙ tanh(c_t)
    h_t = m_t              or   W_hr m_t               (projected: Sak et al., 2014)

Backward, from ∂h_t and ∂c_t:

    ∂m = ∂h_t              or   W_hrᵀ ∂h_t
    ∂c = ∂c_t + ∂m ⊙ o ⊙ (1 − tanh²(c_t))
    ∂c_{t−1} = ∂c ⊙ f                                  the additive path: no weight matrix, no squashing
    ∂a_i = ∂c ⊙ g ⊙ i(1−i)       ∂a_f = ∂c ⊙ c_{t−1} ⊙ f(1−f)
    ∂a_g = ∂c ⊙ i ⊙ (1−g²)       ∂a_o = ∂m ⊙ tanh(c_t) ⊙ o(1−o)
    ∂h_{t−1} = W_hhᵀ ∂a_t
"""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from throughtime.cells.cell import Linearised, Parameters, StepGradient, affine_backward, project
from throughtime.shapes import StepCell, StepHidden, StepInput


class Saved(NamedTuple):
    """What `step_backward` needs of a step."""

    x: StepInput
    h_prev: StepHidden
    c_prev: StepCell
    i: StepCell
    f: StepCell
    g: StepCell
    o: StepCell
    tanh_c: StepCell


def step(
    x: StepInput, state: tuple[StepHidden, StepCell], parameters: Parameters
) -> tuple[tuple[StepHidden, StepCell], Saved]:
    """Advance one step: the state (h_{t−1}, c_{t−1}) becomes (h_t, c_t)."""
    h_prev, c_prev = state
    a = linear(x, parameters.weight_ih, parameters.bias_ih) + linear(h_prev, parameters.weight_hh, parameters.bias_hh)
    a_i, a_f, a_g, a_o = a.chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
    c = f * c_prev + i * g
    tanh_c = torch.tanh(c)
    h = project(o * tanh_c, parameters.weight_hr)
    return (h, c), Saved(x, h_prev, c_prev, i, f, g, o, tanh_c)


def step_backward(grad_state: tuple[StepHidden, StepCell], saved: Saved, parameters: Parameters) -> StepGradient:
    """Carry (∂h_t, ∂c_t) back over the step: to x_t, to (h_{t−1}, c_{t−1}), and to the weights."""
    grad_h, grad_c = grad_state
    x, h_prev, c_prev, i, f, g, o, tanh_c = saved

    grad_m, grad_weight_hr = grad_h, None
    if parameters.weight_hr is not None:
        grad_m, grad_weight_hr, _ = affine_backward(grad_h, o * tanh_c, parameters.weight_hr, None)

    grad_c = grad_c + grad_m * o * (1 - tanh_c * tanh_c)
    grad_a = torch.cat(
        [
            grad_c * g * i * (1 - i),
            grad_c * c_prev * f * (1 - f),
            grad_c * i * (1 - g * g),
            grad_m * tanh_c * o * (1 - o),
        ],
        dim=1,
    )
    grad_x, grad_weight_ih, grad_bias_ih = affine_backward(grad_a, x, parameters.weight_ih, parameters.bias_ih)
    grad_h_prev, grad_weight_hh, grad_bias_hh = affine_backward(
        grad_a, h_prev, parameters.weight_hh, parameters.bias_hh
    )
    return StepGradient(
        grad_x,
        (grad_h_prev, grad_c * f),
        Parameters(grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr),
    )


def linearise(saved: Saved) -> Linearised:
    """Return `step_backward`'s factors, without a projection: ∂c = ∂c_t + ∂h_t ⊙ o ⊙ (1 − tanh²(c_t)) put into the rest."""
    _, _, c_prev, i, f, g, o, tanh_c = saved
    h_to_c = o * (1 - tanh_c * tanh_c)
    nothing = torch.zeros_like(o)
    c_to_a = torch.stack([g * i * (1 - i), c_prev * f * (1 - f), i * (1 - g * g), nothing], dim=1)
    h_to_a = h_to_c[:, None] * c_to_a
    h_to_a[:, 3] = tanh_c * o * (1 - o)
    return Linearised((h_to_a, c_to_a), None, ((None, h_to_c * f), (None, f)))
