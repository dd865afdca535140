"""Dropout that holds still: one mask for a whole window, as Gal & Ghahramani (2016) and AWD-LSTM (Merity et al., 2018) use it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from throughtime.layers import Recurrent
from throughtime.stack import draw_mask


class Dropout(nn.Module):
    """Drops each unit by itself, as torch.nn.Dropout does: drawing is 5 times as fast, and was a sixth of a character model's step.

    Args:
        p: Probability of dropping a unit, while training; a multiple of 1/65,536.

    Example:
        >>> import torch
        >>> Dropout(0.5)(torch.ones(1000)).unique().tolist()
        [0.0, 2.0]
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some of its elements 0, and the others 1 / (1 − p) times what they were."""
        if not self.training or not self.p:
            return x
        return (x / (1 - self.p)).masked_fill(draw_mask(self.p, x.shape, x.device), 0)


class LockedDropout(nn.Module):
    """Drops the same units at every step of a window: one mask for each batch row.

    Args:
        p: Probability of dropping a unit, while training.

    Example:
        >>> import torch
        >>> y = LockedDropout(0.5)(torch.ones(20, 3, 8))
        >>> bool((y == y[0]).all())
        True
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x (T, B, H) with some of its units 0 at every step, and the others 1 / (1 − p) times what they were."""
        if not self.training or not self.p:
            return x
        return x * torch.empty_like(x[:1]).bernoulli_(1 - self.p).div_(1 - self.p)


def embedding_mask(rows: int, p: float, like: Tensor) -> Tensor:
    """Return a mask (rows, 1) that drops whole rows of an embedding, so that a token is unseen wherever it occurs in a window."""
    return torch.empty(rows, 1, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)


class LockedStack(nn.Module):
    """Recurrent layers with locked dropout between them, called as one layer is.

    Args:
        layers: Layers of one layer each, the lowest first.
        p: Probability of dropping an output of each but the last.
    """

    def __init__(self, layers: Sequence[Recurrent], p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.between = LockedDropout(p)

    def forward(
        self,
        input: Tensor,
        hx: Tensor | tuple[Tensor, ...] | None = None,
        *,
        lengths: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """Return the output of the last layer, and the states (L, B, H) of all, as a single layer would."""
        finals = []
        for place, layer in enumerate(self.layers):
            if place:
                input = self.between(input)
            input, final = layer(input, _of_layer(hx, place), lengths=lengths, embedding=None if place else embedding)
            finals.append(final)
        if isinstance(finals[0], tuple):
            return input, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        return input, torch.cat(finals)


def _of_layer(hx: Tensor | tuple[Tensor, ...] | None, place: int) -> Tensor | tuple[Tensor, ...] | None:
    if isinstance(hx, tuple):
        return tuple(part[place : place + 1] for part in hx)
    return None if hx is None else hx[place : place + 1]
