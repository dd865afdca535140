"""Sequences that begin anew in the midst of a row with another state than the row began with.

The operator goes back to the state that a row began with. So a row is cut in pieces that are rows of their own, each with the state
that its own begins with: what comes before its first reset, and the rest; where there is a reverse direction, which comes from the
other end, what comes after the last reset, too. Each step is computed once; what is added is to copy input and output.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from throughtime import stack, watching
from throughtime.request import Sequences, Stack
from throughtime.spec import Parameters

States = tuple[Tensor, ...]


def run(
    asked: Stack, weights: Sequence[Parameters], sequences: Sequences, state: States, fresh: States
) -> tuple[Tensor, States]:
    """Run a stack whose state becomes `fresh` where a sequence begins anew. The arguments have been checked.

    Args:
        asked: What to run.
        weights: As in `stack.run`.
        sequences: What it reads, padded, with `reset`.
        state: What each row begins with, each (L · directions, B, ·).
        fresh: What it becomes at a reset, shaped like `state`.

    Returns:
        As `stack.run` does.
    """
    reset = sequences.reset
    assert reset is not None
    if reset.device.type == "cpu" and watching.has_values(all_ := watching.values(reset)) and not all_.any():
        return stack.run(asked, weights, sequences._replace(reset=None), state)
    cut = _Cut.at(reset, sequences.lengths, asked.directions)
    pieces = sequences._replace(
        input=cut.take(sequences.input), reset=cut.take(reset), lengths=(cut.stops - cut.starts).flatten()
    )
    both = zip(state, fresh, strict=True)
    output, final = stack.run(asked, weights, pieces, tuple(cut.begin(*pair) for pair in both))
    return cut.join(output), tuple(cut.end(s) for s in final)


class _Cut(NamedTuple):
    """Where rows are cut in K pieces, one after the other; some may be empty.

    Attributes:
        steps: The steps' numbers (T, 1), int64.
        starts: The step at which each piece begins (K, B), int64.
        stops: The step before which it ends (K, B).
        is_cut: Whether a row has a reset at all (B,).
        directions: 1 or 2.
    """

    steps: Tensor
    starts: Tensor
    stops: Tensor
    is_cut: Tensor
    directions: int

    @classmethod
    def at(cls, reset: Tensor, lengths: Tensor | None, directions: int) -> "_Cut":
        """Cut before the first reset that is within a row, and with two directions before the last one, too."""
        count, rows = reset.shape
        steps = torch.arange(count, device=reset.device)[:, None]
        ends = steps.new_full((rows,), count) if lengths is None else lengths
        is_cut = reset & (steps < ends)
        first = torch.where(is_cut, steps, ends).amin(0)
        last = torch.where(is_cut.any(0), torch.where(is_cut, steps, -1).amax(0), ends)
        starts = torch.stack([torch.zeros_like(first), first, last][: directions + 1])
        stops = torch.stack([first, last, ends] if directions == 2 else [first, ends])
        return cls(steps, starts, stops, is_cut.any(0), directions)

    def take(self, tensor: Tensor) -> Tensor:
        """Return (T, K · B, ·) of (T, B, ·): each piece from its first step on. What comes after it doesn't matter."""
        pieces, rows = self.starts.shape
        places = (self.steps[..., None] + self.starts).clamp(max=self.steps.shape[0] - 1) * rows
        places = places + torch.arange(rows, device=places.device)
        return rows_at(tensor, places).view(self.steps.shape[0], pieces * rows, *tensor.shape[2:])

    def begin(self, state: Tensor, fresh: Tensor) -> Tensor:
        """Return the pieces' initial states (L · directions, K · B, ·)."""
        if self.directions == 1:
            return torch.cat([state, fresh], 1)
        (forward, reverse), (forward_fresh, reverse_fresh) = (_ways(s) for s in (state, fresh))
        first = torch.where(
            self.is_cut[:, None], reverse_fresh, reverse
        )  # which is the last one where there is no other
        pieces = [
            torch.cat([forward, forward_fresh, forward_fresh], 1),
            torch.cat([first, reverse_fresh, reverse], 1),
        ]
        return torch.stack(pieces, 1).flatten(0, 1)

    def join(self, output: Tensor) -> Tensor:
        """Return (T, B, ·) of the pieces' (T, K · B, ·)."""
        pieces, rows = self.starts.shape
        piece = sum((self.steps >= start).long() for start in self.starts[1:])
        assert isinstance(piece, Tensor)
        local = self.steps - self.starts.gather(0, piece)
        places = local * (pieces * rows) + piece * rows + torch.arange(rows, device=piece.device)
        return rows_at(output, places).view(self.steps.shape[0], rows, -1)

    def end(self, final: Tensor) -> Tensor:
        """Return the rows' final states (L · directions, B, ·) of the pieces'."""
        pieces, rows = self.starts.shape
        last = self.is_cut.long() * (pieces - 1)
        ends = [last]
        if self.directions == 2:  # a reverse direction ends at step 0, in the first piece that isn't empty
            first = 2 - 2 * (self.stops[0] > 0).long()
            ends.append(torch.where((self.stops[0] == 0) & (self.stops[1] > 0), 1, first))
        each = final.unflatten(1, (pieces, rows)).unflatten(0, (-1, self.directions))
        chosen = torch.stack(ends)[None, :, None, :, None].expand(len(each), -1, 1, -1, final.shape[-1])
        return each.gather(2, chosen).squeeze(2).flatten(0, 1)


def _ways(state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states (L, B, ·) of the forward directions and of the reverse ones."""
    forward, reverse = state.unflatten(0, (-1, 2)).unbind(1)
    return forward, reverse


def rows_at(tensor: Tensor, places: Tensor) -> Tensor:
    """Return the rows of (T, B, ·) at places t · B + b."""
    return tensor.flatten(0, 1).index_select(0, places.flatten())
