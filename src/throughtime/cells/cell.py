"""What every cell has: parameters, a step, and that step's derivative."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from throughtime.cells.layer_norm import normalise, normalise_backward
from throughtime.shapes import StepHidden, StepInput, StepState


class Parameters(NamedTuple):
    """The weights of one layer in one direction, under torch's names and in torch's order; then those of variants.

    Absent ones are `None`. The same tuple carries gradients.

    Attributes:
        weight_ch: Peephole weights, cut like a bias: i, f, o; or f, o where the gates are coupled.
        gain_ih: Gain of the layer normalisation of W_ih x; its shift is `bias_ih`.
        gain_hh: Gain of the layer normalisation of W_hh h; its shift is `bias_hh`.
        gain_c: Gain of the layer normalisation of an LSTM's c.
        shift_c: Shift of the same.
    """

    weight_ih: Float[Tensor, "GH I"]
    weight_hh: Float[Tensor, "GH P"]
    bias_ih: Float[Tensor, "GH"] | None = None
    bias_hh: Float[Tensor, "GH"] | None = None
    weight_hr: Float[Tensor, "P H"] | None = None
    weight_ch: Float[Tensor, "_"] | None = None
    gain_ih: Float[Tensor, "GH"] | None = None
    gain_hh: Float[Tensor, "GH"] | None = None
    gain_c: Float[Tensor, "H"] | None = None
    shift_c: Float[Tensor, "H"] | None = None

    @classmethod
    def from_list(cls, tensors: list[Tensor], extra: tuple[str, ...] = ()) -> "Parameters":
        """Read the flat order: torch's own 2, 3, 4 or 5 tensors, whose number tells which there are; then a variant's.

        Args:
            tensors: The tensors that are there.
            extra: Names of the last ones: the cell's `extra`.
        """
        own = tensors[: len(tensors) - len(extra)]
        variant = dict(zip(extra, tensors[len(own) :], strict=True))
        if len(own) in (2, 4):
            return cls(*own, **variant)
        if len(own) in (3, 5):
            return cls(*own[:-1], weight_hr=own[-1], **variant)
        raise ValueError(
            f"{len(tensors)} parameter tensors; expected weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]"
            + "".join(f", {name}" for name in extra)
        )

    def to_list(self) -> list[Tensor]:
        """Return the tensors that are there, in the flat order."""
        return list(self.there().values())

    def there(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def zeros(self) -> "Parameters":
        """Return an empty sum to which gradients can be added."""
        return self._replace(**{name: torch.zeros_like(tensor) for name, tensor in self.there().items()})

    def plus(self, other: "Parameters") -> "Parameters":
        """Return the sum, tensor by tensor: the Σ over t of ∂L/∂W = Σ_t ∂L_t/∂W."""
        return self._replace(**{name: tensor + other.there()[name] for name, tensor in self.there().items()})


class Masks(NamedTuple):
    """What a variant drops or keeps, drawn before the sequence; all `None` in a plain cell.

    Attributes:
        zoneout_h: Where h keeps its old value (T, B, P), bool; or, as a number (0-d), the share of it that is kept at
            every step: the expectation.
        zoneout_c: The same for an LSTM's c, (T, B, H).
        recurrent_dropout: What h_{t−1} is multiplied by as it enters W_hh, at every step: (B, P), zeros and 1/(1 − p).
    """

    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    recurrent_dropout: StepHidden | None = None

    @classmethod
    def from_list(cls, tensors: list[Tensor], names: tuple[str, ...]) -> "Masks":
        """Read a flat list; `names` is the cell's `masks`."""
        if len(tensors) != len(names):
            raise ValueError(f"{len(tensors)} masks; expected {', '.join(names) or 'none'}")
        return cls(**dict(zip(names, tensors, strict=True)))


NO_MASKS = Masks()


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
        step: `(x, state, parameters, recurrent_dropout=None) -> (state, saved)`.
        step_backward: `(grad_state, saved, parameters, recurrent_dropout=None) -> StepGradient`.
        linearise: `saved -> Linearised`, for a step whose state has not been projected; `None` where it has no such form.
        extra: Parameters that the variant has beyond torch's, in their order in `Parameters`.
        masks: Masks that it takes, in their order in `Masks`.
    """

    name: str
    gates: int
    state_size: int
    saved: type[tuple[Tensor, ...]]
    step: Callable[..., tuple[StepState, tuple[Tensor, ...]]]
    step_backward: Callable[..., StepGradient]
    linearise: Callable[..., Linearised] | None = None
    extra: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()


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
