"""Masks: steps that a row passes over. Those that it reads are moved to its front, and what comes out is moved back."""

from typing import NamedTuple

import torch
from torch import Tensor

from throughtime import watching
from throughtime.episodes import rows_at
from throughtime.request import Sequences


class Skipping(NamedTuple):
    """Which steps of each row are read.

    Attributes:
        mask: True at those (T, B).
        order: Their numbers, in order, and then those of the others (T, B), int64; or `None` where no row passes over any
            before its end, so that nothing has to be moved.
    """

    mask: Tensor
    order: Tensor | None

    @classmethod
    def by(cls, mask: Tensor) -> "Skipping":
        """Read a mask (T, B), bool."""
        values = watching.values(mask)
        if values is mask and watching.has_values(mask) and not (mask[1:] & ~mask[:-1]).any():
            return cls(mask, None)
        read, steps = mask.long().cumsum(0), torch.arange(mask.shape[0], device=mask.device)[:, None]
        places = torch.where(mask, read - 1, read[-1] + steps - read)
        return cls(mask, torch.zeros_like(places).scatter(0, places, steps.expand_as(places)))

    def take(self, sequences: Sequences) -> Sequences:
        """Return sequences without what they pass over: each row's own steps, and how many there are."""
        lengths, reset = self.mask.sum(0), sequences.reset
        if self.order is None:
            return sequences._replace(lengths=lengths)
        if reset is not None:  # one at a step that is passed over is the next step's
            begun = self._moved(reset.long().cumsum(0))
            reset = begun.diff(dim=0, prepend=begun.new_zeros(1, begun.shape[1])) > 0
        return sequences._replace(input=self._moved(sequences.input), lengths=lengths, reset=reset)

    def join(self, output: Tensor) -> Tensor:
        """Return the output (T, B, ·) at its own steps, and zeros at the others."""
        if self.order is None:
            return output
        places = (self.mask.long().cumsum(0) - 1).clamp(min=0) * self.mask.shape[1]
        moved = rows_at(output, places + torch.arange(self.mask.shape[1], device=output.device)).view(output.shape)
        return torch.where(self.mask[..., None], moved, 0)

    def _moved(self, tensor: Tensor) -> Tensor:
        assert self.order is not None
        rows = self.mask.shape[1]
        places = self.order * rows + torch.arange(rows, device=tensor.device)
        return rows_at(tensor, places).view(tensor.shape)
