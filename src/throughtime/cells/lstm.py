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

Variants, in any combination; each says what it changes.

Peepholes (Gers & Schmidhuber, 2000), diagonal weights p = `weight_ch`:

    a_i, a_f  gain  p_i ⊙ c_{t−1}, p_f ⊙ c_{t−1}       a_o  gains  p_o ⊙ c_t
    ∂c  gains  ∂a_o ⊙ p_o                              ∂c_{t−1}  gains  ∂a_i ⊙ p_i + ∂a_f ⊙ p_f

Coupled input and forget gates (CIFG: Greff et al., 2017): i = 1 − f, so there are three gates in the order f g o, and no p_i:

    ∂a_f = ∂c ⊙ (c_{t−1} − g) ⊙ f(1−f)

Layer normalisation (Ba et al., 2016), each LN over all gates' rows together:

    a_t = LN(W_ih x_t; gain_ih) + b_ih + LN(W_hh h_{t−1}; gain_hh) + b_hh
    m_t = o ⊙ tanh(n_t),   n_t = LN(c_t; gain_c, shift_c)
    ∂c = ∂c_t + ∂n carried back over LN,   ∂n = ∂m ⊙ o ⊙ (1 − tanh²(n_t)),   and n_t for c_t in ∂a_o

This is also Haste's form. TensorFlow's LayerNormBasicLSTMCell differs: it normalises a_i, a_f, a_g and a_o each by itself, after
W_ih x and W_hh h are added, and hands c_t on normalised. Peepholes see c_t as it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.cells.cell import Linearised, StepGradient, affine, affine_backward, drop, joined, project
from throughtime.cells.layer_norm import normalise, normalise_backward
from throughtime.shapes import StepCell, StepHidden, StepInput
from throughtime.spec import Parameters


class Saved(NamedTuple):
    """What `step_backward` needs of a step; `tanh_c` is tanh(n_t) where c is normalised."""

    x: StepInput
    h_prev: StepHidden
    c_prev: StepCell
    i: StepCell
    f: StepCell
    g: StepCell
    o: StepCell
    tanh_c: StepCell


def step(
    x: StepInput,
    state: tuple[StepHidden, StepCell],
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
    *,
    coupled: bool = False,
) -> tuple[tuple[StepHidden, StepCell], Saved]:
    """Advance one step: the state (h_{t−1}, c_{t−1}) becomes (h_t, c_t)."""
    h_prev, c_prev = state
    p = parameters
    a = affine(x, p.weight_ih, p.bias_ih, p.gain_ih)
    a = a + affine(drop(h_prev, recurrent_dropout), p.weight_hh, p.bias_hh, p.gain_hh)
    *a_i, a_f, a_g, a_o = a.chunk(3 if coupled else 4, dim=1)
    *p_i, p_f, p_o = _peepholes(p, coupled)

    f, g = torch.sigmoid(a_f if p_f is None else a_f + p_f * c_prev), torch.tanh(a_g)
    i = 1 - f if coupled else torch.sigmoid(a_i[0] if p_i[0] is None else a_i[0] + p_i[0] * c_prev)
    c = f * c_prev + i * g
    o = torch.sigmoid(a_o if p_o is None else a_o + p_o * c)
    tanh_c = torch.tanh(c if p.gain_c is None else normalise(c, p.gain_c, p.shift_c))
    h = project(o * tanh_c, p.weight_hr)
    return (h, c), Saved(x, h_prev, c_prev, i, f, g, o, tanh_c)


def step_backward(
    grad_state: tuple[StepHidden, StepCell],
    saved: Saved,
    parameters: Parameters,
    recurrent_dropout: StepHidden | None = None,
    *,
    coupled: bool = False,
) -> StepGradient:
    """Carry (∂h_t, ∂c_t) back over the step: to x_t, to (h_{t−1}, c_{t−1}), and to the weights."""
    grad_h, grad_c = grad_state
    x, h_prev, c_prev, i, f, g, o, tanh_c = saved
    p = parameters
    *_, p_o = _peepholes(p, coupled)
    c = f * c_prev + i * g

    grad_m, grad_weight_hr = grad_h, None
    if p.weight_hr is not None:
        grad_m, grad_weight_hr, *_ = affine_backward(grad_h, o * tanh_c, p.weight_hr, None)

    grad_n, grad_gain_c, grad_shift_c = grad_m * o * (1 - tanh_c * tanh_c), None, None
    if p.gain_c is not None:
        grad_shift_c = grad_n.sum(0)
        grad_n, grad_gain_c = normalise_backward(grad_n, c, p.gain_c)
    grad_a_o = grad_m * tanh_c * o * (1 - o)
    grad_c = grad_c + grad_n if p_o is None else grad_c + grad_n + grad_a_o * p_o

    grad_a_f = grad_c * (c_prev - g if coupled else c_prev) * f * (1 - f)
    grad_a_i = [] if coupled else [grad_c * g * i * (1 - i)]
    grad_a = torch.cat([*grad_a_i, grad_a_f, grad_c * i * (1 - g * g), grad_a_o], dim=1)
    grad_c_prev, grad_weight_ch = grad_c * f, None
    if p.weight_ch is not None:
        grad_weight_ch = torch.cat([*((grad * c_prev).sum(0) for grad in (*grad_a_i, grad_a_f)), (grad_a_o * c).sum(0)])
        for grad, weight in zip((*grad_a_i, grad_a_f), p.weight_ch.split(c.shape[1]), strict=False):
            grad_c_prev = grad_c_prev + grad * weight

    through_ih = affine_backward(grad_a, x, p.weight_ih, p.bias_ih, p.gain_ih)
    through_hh = affine_backward(grad_a, drop(h_prev, recurrent_dropout), p.weight_hh, p.bias_hh, p.gain_hh)
    return StepGradient(
        through_ih.x,
        (drop(through_hh.x, recurrent_dropout), grad_c_prev),
        joined(
            *(through_ih, through_hh),
            weight_hr=grad_weight_hr,
            weight_ch=grad_weight_ch,
            gain_c=grad_gain_c,
            shift_c=grad_shift_c,
        ),
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


def _peepholes(parameters: Parameters, coupled: bool) -> list[Tensor | None]:
    """Cut `weight_ch` into i, f, o; or f, o where the gates are coupled."""
    count = 2 if coupled else 3
    return [None] * count if parameters.weight_ch is None else list(parameters.weight_ch.chunk(count))
