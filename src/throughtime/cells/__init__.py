"""The equations: every cell's step and its derivative, in plain torch, and the time loop both ways.

This is the reference that every kernel answers to. It is written to be read.
"""

from functools import partial

from throughtime.cells import gru, lstm, readout, rnn, sequence
from throughtime.cells.cell import Cell, Linearised, Parameters, StepGradient

_relu = {"nonlinearity": "relu"}

CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 1, 1, rnn.Saved, rnn.step, rnn.step_backward, rnn.linearise),
        Cell(
            *("rnn_relu", 1, 1, rnn.Saved),
            partial(rnn.step, **_relu),
            partial(rnn.step_backward, **_relu),
            partial(rnn.linearise, **_relu),
        ),
        Cell("lstm", 4, 2, lstm.Saved, lstm.step, lstm.step_backward, lstm.linearise),
        Cell("gru", 3, 1, gru.Saved, gru.step, gru.step_backward, gru.linearise),
        Cell("gru_reset_before", 3, 1, gru.SavedResetBefore, gru.step_reset_before, gru.step_reset_before_backward),
    )
}

__all__ = ["CELLS", "Cell", "Linearised", "Parameters", "StepGradient", "gru", "lstm", "readout", "rnn", "sequence"]
