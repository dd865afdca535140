"""The equations: every cell's step and its derivative, in plain torch, and the time loop both ways.

This is the reference that every kernel answers to. It is written to be read.
"""

from functools import lru_cache, partial

from throughtime import spec
from throughtime.cells import gru, lstm, mgu, readout, rnn, sequence
from throughtime.cells.cell import Cell, Linearised, StepGradient, recurrent_factors
from throughtime.spec import Masks, Parameters

_relu = {"nonlinearity": "relu"}

CELLS: dict[str, Cell] = {
    cell.spec.base: cell
    for cell in (
        Cell(spec.read("rnn_tanh"), rnn.Saved, rnn.step, rnn.step_backward, rnn.linearise, recurrent_factors),
        Cell(
            *(spec.read("rnn_relu"), rnn.Saved),
            partial(rnn.step, **_relu),
            partial(rnn.step_backward, **_relu),
            partial(rnn.linearise, **_relu),
            recurrent_factors,
        ),
        Cell(spec.read("lstm"), lstm.Saved, lstm.step, lstm.step_backward, lstm.linearise, recurrent_factors),
        Cell(spec.read("gru"), gru.Saved, gru.step, gru.step_backward, gru.linearise, gru.recurrent_factors),
        Cell(
            *(spec.read("gru_reset_before"), gru.SavedResetBefore),
            *(gru.step_reset_before, gru.step_reset_before_backward),
            recurrent_factors=gru.recurrent_factors_reset_before,
        ),
        Cell(spec.read("mgu"), mgu.Saved, mgu.step, mgu.step_backward, recurrent_factors=mgu.recurrent_factors),
    )
}


@lru_cache
def find(name: str) -> Cell:
    """Return the equations of a cell by its name, which `throughtime.spec.read` reads: a key of `CELLS`, or one with variants.

    A variant's equations stand with the cell's own.

    Raises:
        InputError: There is no such cell or variant.

    Example:
        >>> from throughtime import cells
        >>> cells.find("lstm+peepholes").spec.variant_parameters
        ('weight_ch',)
    """
    said = spec.read(name)
    cell = CELLS[said.base]
    if said.is_coupled:
        step, step_backward = (partial(f, coupled=True) for f in (cell.step, cell.step_backward))
        cell = cell._replace(step=step, step_backward=step_backward)
    if said.variant_parameters:  # whose gradients ∂a alone doesn't tell
        cell = cell._replace(recurrent_factors=None)
    return cell._replace(spec=said, linearise=None if said.variants else cell.linearise)


__all__ = [
    "CELLS",
    "Cell",
    "Linearised",
    "Masks",
    "Parameters",
    "StepGradient",
    "find",
    "gru",
    "lstm",
    "mgu",
    "readout",
    "rnn",
    "sequence",
]
