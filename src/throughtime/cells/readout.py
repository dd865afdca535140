"""The output of a recurrent network and its loss at one step.

    y_t = W_hy h_t + b_y                    logits, as wide as the vocabulary, whatever the width of h
    p_t = softmax(y_t)
    L_t = −ln p_t[target]                   summed over the batch, in nats

Backward, from ∂L_t:   ∂y_t = ∂L_t (p_t − onehot(target)),   ∂h_t = W_hyᵀ ∂y_t
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, one_hot

from throughtime.cells.cell import affine_backward
from throughtime.shapes import StepHidden


class Saved(NamedTuple):
    """What `step_backward` needs of a step."""

    h: StepHidden
    p: Float[Tensor, "B V"]
    target: Int[Tensor, "B"]


class ReadoutGradient(NamedTuple):
    """Gradients for the hidden state and the readout's weights."""

    h: StepHidden
    weight: Float[Tensor, "V P"]
    bias: Float[Tensor, "V"] | None


def step(
    h: StepHidden, weight: Float[Tensor, "V P"], bias: Float[Tensor, "V"] | None, target: Int[Tensor, "B"]
) -> tuple[Float[Tensor, "B V"], Float[Tensor, ""], Saved]:
    """Read y_t out of h_t and compare it with the target: return (y_t, L_t, saved)."""
    y = linear(h, weight, bias)
    log_p = torch.log_softmax(y, dim=1)
    loss = -log_p.gather(1, target[:, None]).sum()
    return y, loss, Saved(h, log_p.exp(), target)


def step_backward(
    grad_loss: Float[Tensor, ""], saved: Saved, weight: Float[Tensor, "V P"], bias: Float[Tensor, "V"] | None
) -> ReadoutGradient:
    """Carry ∂L_t back to h_t, W_hy and b_y."""
    h, p, target = saved
    grad_y = grad_loss * (p - one_hot(target, p.shape[1]).to(p))
    gradient = affine_backward(grad_y, h, weight, bias)
    return ReadoutGradient(gradient.x, gradient.weight, gradient.bias)
