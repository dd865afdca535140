"""Clipping: what tames exploding gradients (Pascanu et al., 2013)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from throughtime.errors import FieldError


class ClipReport(NamedTuple):
    """What a clip met.

    Attributes:
        norm: Global norm of the gradient before clipping, a scalar tensor (so that nothing waits for it).
        clipped: Whether anything was scaled or cut, a bool tensor.
    """

    norm: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class Clipping:
    """Clip by global norm, by value, both, or neither.

    Attributes:
        norm: The gradient is scaled down to this global norm; 0 is off.
        value: Then each entry is cut to [−value, value]; 0 is off.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> Clipping(norm=1.0).apply([weight]).norm.item(), [round(g, 3) for g in weight.grad.tolist()]
        (5.0, [0.6, 0.8])
    """

    norm: float = 0.0
    value: float = 0.0

    def __post_init__(self) -> None:
        for field, bound in (("norm", self.norm), ("value", self.value)):
            if not 0 <= bound <= 1e30:  # float32 ends at 3e38
                raise FieldError(field, bound, "a bound above 0, at most 1e30, or 0 for none")

    def apply(self, parameters: Iterable[Tensor]) -> ClipReport:
        """Clip the gradients in place. A norm that is not finite is reported, not repaired.

        On a CPU, where looking at the norm waits for nothing, gradients below the bound are not touched.
        """
        parameters = [p for p in parameters if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        clipped = torch.zeros((), dtype=torch.bool, device=norm.device)
        if self.norm:
            clipped = norm > self.norm
            if norm.device.type != "cpu" or clipped:
                nn.utils.clip_grads_with_norm_(parameters, self.norm, norm)
        if self.value:
            largest = torch.stack([g.abs().max() for g in grads]).max()
            clipped = clipped | (largest > self.value)
            nn.utils.clip_grad_value_(parameters, self.value)
        return ClipReport(norm, clipped)
