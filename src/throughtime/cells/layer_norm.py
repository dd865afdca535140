"""Layer normalisation (Ba et al., 2016), as it stands inside a cell.

    μ = mean(u)      σ² = mean((u − μ)²)      û = (u − μ) / √(σ² + ε)        over the units of each row, ε = 1e-5
    a = gain ⊙ û + shift

Backward, from ∂a:

    ∂û = gain ⊙ ∂a
    ∂u = (∂û − mean(∂û) − û ⊙ mean(∂û ⊙ û)) / √(σ² + ε)
    ∂gain = Σ_b ∂a ⊙ û                          ∂shift = Σ_b ∂a
"""

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-5


def normalise(
    u: Float[Tensor, "B A"], gain: Float[Tensor, "A"], shift: Float[Tensor, "A"] | None = None
) -> Float[Tensor, "B A"]:
    """Return a = gain ⊙ û + shift."""
    a = gain * _standardise(u)[0]
    return a if shift is None else a + shift


def normalise_backward(
    grad_a: Float[Tensor, "B A"], u: Float[Tensor, "B A"], gain: Float[Tensor, "A"]
) -> tuple[Float[Tensor, "B A"], Float[Tensor, "A"]]:
    """Carry ∂a back over `normalise`: return (∂u, ∂gain)."""
    standard, scale = _standardise(u)
    grad = gain * grad_a
    grad_u = (grad - grad.mean(1, keepdim=True) - standard * (grad * standard).mean(1, keepdim=True)) * scale
    return grad_u, (grad_a * standard).sum(0)


def _standardise(u: Float[Tensor, "B A"]) -> tuple[Float[Tensor, "B A"], Float[Tensor, "B 1"]]:
    """Return û and 1 / √(σ² + ε)."""
    centred = u - u.mean(1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(1, keepdim=True) + EPSILON)
    return centred * scale, scale
