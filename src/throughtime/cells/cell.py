"""What every cell has: a step, and that step's derivative."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from throughtime.cells.layer_norm import normalise, normalise_backward
from throughtime.shapes import StepHidden, StepInput, StepState
from throughtime.spec import Parameters, Spec


class StepGradient(NamedTuple):
    """What one step of backpropagation yields: gradients for the step's input, the state before it, and the weights."""

    x: StepInput
    state: StepState
    parameters: Parameters


class Linearised(NamedTuple):
    """A step's derivative with respect to the state before it, as factors that its saved values fix, row by row.

    Where each unit's gates see no other unit's state but through W_hh, backpropagation over a step is

        ∂a = Σ_i recurrent[i] ⊙ ∂s_i,t        ∂s_j,t−1 = Σ_i direct[i][j] ⊙ ∂s_i,t   + W_hhᵀ ∂a where s_j is h

    with s = (h,) or (h, c). Many gradients can then be carried over the same step at the cost of one product each.

    Attributes:
        recurrent: For each part of the state, (B, G, H): what becomes of its gradient on the way to W_hh h_{t−1}.
        inputs: The same on the way to W_ih x_t; `None` where it is no different.
        direct: For each part of the state, what of its gradient goes straight to each part before, (B, H), or `None`.
    """

    recurrent: tuple[Float[Tensor, "B G H"], ...]
    inputs: tuple[Float[Tensor, "B G H"], ...] | None
    direct: tuple[tuple[Float[Tensor, "B H"] | None, ...], ...]


class Cell(NamedTuple):
    """A cell as the time loop sees it.

    Attributes:
        spec: What its name says: gates, states, and what variants bring.
        saved: The NamedTuple of tensors that `step` keeps for `step_backward`.
        step: `(x, state, parameters, recurrent_dropout=None) -> (state, saved)`.
        step_backward: `(grad_state, saved, parameters, recurrent_dropout=None) -> StepGradient`.
        linearise: `saved -> Linearised`, for a step whose state has not been projected; `None` where it has no such form.
        recurrent_factors: `(grad_a, columns_of_w, h_in, parameters) -> [(∂u, v), …]`, of any steps at once: the products
            u = W_hh v + b_hh that a step takes, cut along their rows, and the gradients there, from the gradient ∂a at
            w = W_ih x + b_ih; `columns_of_w(slice)` computes some of w, h_in is h_{t−1} as it enters. `None` where ∂a doesn't
            tell the gradients of all parameters.
    """

    spec: Spec
    saved: type[tuple[Tensor, ...]]
    step: Callable[..., tuple[StepState, tuple[Tensor, ...]]]
    step_backward: Callable[..., StepGradient]
    linearise: Callable[..., Linearised] | None = None
    recurrent_factors: Callable[..., list[tuple[Tensor, Tensor]]] | None = None


def drop(h_prev: StepHidden, recurrent_dropout: StepHidden | None) -> StepHidden:
    """Return h_{t−1} as it enters W_hh."""
    return h_prev if recurrent_dropout is None else h_prev * recurrent_dropout


def affine(
    x: Float[Tensor, "B D"],
    weight: Float[Tensor, "A D"],
    bias: Float[Tensor, "A"] | None,
    gain: Float[Tensor, "A"] | None = None,
) -> Float[Tensor, "B A"]:
    """Return a = W x + b or, with a gain, a = LN(W x; gain) + b."""
    return linear(x, weight, bias) if gain is None else normalise(linear(x, weight), gain, bias)


class AffineGradient(NamedTuple):
    """Gradients of `affine`: for x, W, b and the gain, all but the first summed over the batch."""

    x: Float[Tensor, "B D"]
    weight: Float[Tensor, "A D"]
    bias: Float[Tensor, "A"] | None
    gain: Float[Tensor, "A"] | None


def affine_backward(
    grad_a: Float[Tensor, "B A"],
    x: Float[Tensor, "B D"],
    weight: Float[Tensor, "A D"],
    bias: Float[Tensor, "A"] | None,
    gain: Float[Tensor, "A"] | None = None,
) -> AffineGradient:
    """Differentiate a = W x + b: return (Wᵀ ∂a, ∂a xᵀ, ∂a), the last two summed over the batch; or with a gain in between."""
    grad_u, grad_gain = (grad_a, None) if gain is None else normalise_backward(grad_a, linear(x, weight), gain)
    return AffineGradient(grad_u @ weight, grad_u.T @ x, None if bias is None else grad_a.sum(0), grad_gain)


Affine = tuple[Tensor, Tensor | None, Tensor | None]  # weight, bias, gain


def cut_recurrent(parameters: Parameters, row: int | torch.SymInt) -> tuple[Affine, Affine]:
    """Cut W_hh with its bias and gain above `row`, a symbol to a compiler, for gates that don't all meet the same input."""
    weight, bias, gain = parameters.weight_hh, parameters.bias_hh, parameters.gain_hh

    def rows(part: slice) -> Affine:
        return weight[part], None if bias is None else bias[part], None if gain is None else gain[part]

    return rows(slice(row)), rows(slice(row, None))


def stacked(x: StepHidden, upper: AffineGradient, lower: AffineGradient) -> AffineGradient:
    """Return ∂x and the gradients of weight, bias and gain that `cut_recurrent` has cut, put together again."""
    vectors = (upper.bias, lower.bias), (upper.gain, lower.gain)
    bias, gain = (None if a is None or b is None else torch.cat([a, b]) for a, b in vectors)
    return AffineGradient(x, torch.cat([upper.weight, lower.weight]), bias, gain)


def recurrent_factors(
    grad_a: Float[Tensor, "B A"], columns_of_w: Callable[[slice], Tensor], h_in: StepHidden, parameters: Parameters
) -> list[tuple[Float[Tensor, "B A"], StepHidden]]:
    """Return (∂u, v) of a cell that adds W_ih x + b_ih and W_hh h + b_hh: both have the gradient ∂a, and W_hh meets h."""
    return [(grad_a, h_in)]


def joined(through_ih: AffineGradient, through_hh: AffineGradient, **others: Tensor | None) -> Parameters:
    """Return the gradients of both affine maps, and `others`, under the parameters' names."""
    return Parameters(
        *(through_ih.weight, through_hh.weight, through_ih.bias, through_hh.bias),
        gain_ih=through_ih.gain,
        gain_hh=through_hh.gain,
        **others,
    )


def project(m: Float[Tensor, "B H"], weight_hr: Float[Tensor, "P H"] | None) -> StepHidden:
    """Return h = W_hr m where there is a projection, else h = m."""
    return m if weight_hr is None else linear(m, weight_hr)
