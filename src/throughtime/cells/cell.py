"""What every cell has: parameters, a step, and that step's derivative."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from throughtime.shapes import StepHidden, StepInput, StepState


class Parameters(NamedTuple):
    """The weights of one layer in one direction, under torch's names and in torch's order.

    Absent biases and an absent projection are `None`. The same tuple carries gradients.
    """

    weight_ih: Float[Tensor, "GH I"]
    weight_hh: Float[Tensor, "GH P"]
    bias_ih: Float[Tensor, "GH"] | None = None
    bias_hh: Float[Tensor, "GH"] | None = None
    weight_hr: Float[Tensor, "P H"] | None = None

    @classmethod
    def from_list(cls, tensors: list[Tensor]) -> "Parameters":
        """Read torch's flat order; 2, 3, 4 or 5 tensors tell by their number which ones there are."""
        if len(tensors) in (2, 4):
            return cls(*tensors)
        if len(tensors) in (3, 5):
            return cls(*tensors[:-1], weight_hr=tensors[-1])
        raise ValueError(
            f"{len(tensors)} parameter tensors; expected weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]"
        )

    def to_list(self) -> list[Tensor]:
        """Return the tensors that are there, in torch's flat order."""
        return [tensor for tensor in self if tensor is not None]

    def zeros(self) -> "Parameters":
        """Return an empty sum to which gradients can be added."""
        return Parameters.from_list([torch.zeros_like(tensor) for tensor in self.to_list()])

    def plus(self, other: "Parameters") -> "Parameters":
        """Return the sum, tensor by tensor: the Σ over t of ∂L/∂W = Σ_t ∂L_t/∂W."""
        return Parameters.from_list([a + b for a, b in zip(self.to_list(), other.to_list(), strict=True)])


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
        name: Its key in `CELLS`.
        gates: G, the number of H-row blocks in `weight_ih` and `weight_hh`.
        state_size: How many tensors its state has: 1 for (h,), 2 for (h, c).
        saved: The NamedTuple of tensors that `step` keeps for `step_backward`.
        step: `(x, state, parameters) -> (state, saved)`.
        step_backward: `(grad_state, saved, parameters) -> StepGradient`.
        linearise: `saved -> Linearised`, for a step whose state has not been projected; `None` where it has no such form.
    """

    name: str
    gates: int
    state_size: int
    saved: type[tuple[Tensor, ...]]
    step: Callable[..., tuple[StepState, tuple[Tensor, ...]]]
    step_backward: Callable[..., StepGradient]
    linearise: Callable[..., Linearised] | None = None


def affine_backward(
    grad_a: Float[Tensor, "B A"],
    x: Float[Tensor, "B D"],
    weight: Float[Tensor, "A D"],
    bias: Float[Tensor, "A"] | None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "A D"], Float[Tensor, "A"] | None]:
    """Differentiate a = W x + b: return (Wᵀ ∂a, ∂a xᵀ, ∂a), the last two summed over the batch."""
    return grad_a @ weight, grad_a.T @ x, None if bias is None else grad_a.sum(0)


def project(m: Float[Tensor, "B H"], weight_hr: Float[Tensor, "P H"] | None) -> StepHidden:
    """Return h = W_hr m where there is a projection, else h = m."""
    return m if weight_hr is None else linear(m, weight_hr)
