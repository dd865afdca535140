"""The equations: every cell's step and its derivative, in plain torch, and the time loop both ways.

This is the reference that every kernel answers to. It is written to be read.
"""

from functools import lru_cache, partial

from throughtime.cells import gru, lstm, readout, rnn, sequence
from throughtime.cells.cell import Cell, Linearised, Masks, Parameters, StepGradient

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

_MASKS = ("zoneout_h", "zoneout_c", "recurrent_dropout")
_VARIANTS = ("layer_norm", *_MASKS)
_LSTM_VARIANTS = ("coupled", "peepholes", *_VARIANTS)


@lru_cache
def find(name: str) -> Cell:
    """Return a cell by its name: a key of `CELLS`, or one followed by variants, such as "lstm+layer_norm+peepholes".

    Variants are `layer_norm`, `zoneout_h` and `recurrent_dropout`, for an LSTM also `coupled`, `peepholes` and `zoneout_c`.
    Their equations stand with the cell's own; `Cell.extra` and `Cell.masks` name the parameters and masks that they bring.

    Raises:
        KeyError: There is no such cell or variant.

    Example:
        >>> from throughtime import cells
        >>> cells.find("lstm+peepholes+zoneout_h").extra
        ('weight_ch',)
    """
    base, *variants = name.split("+")
    cell = CELLS[base]
    known = _LSTM_VARIANTS if base == "lstm" else [v for v in _VARIANTS if v != "zoneout_c"]
    if unknown := [v for v in variants if v not in known]:
        raise KeyError(f"a cell {base} has no variant {unknown[0]!r}; it has {', '.join(known)}")
    extra = ["weight_ch"] * ("peepholes" in variants)
    if "layer_norm" in variants:
        extra += ["gain_ih", "gain_hh", *(["gain_c", "shift_c"] if base == "lstm" else [])]
    if "coupled" in variants:
        step, step_backward = (partial(f, coupled=True) for f in (cell.step, cell.step_backward))
        cell = cell._replace(gates=3, step=step, step_backward=step_backward)
    if variants:
        cell = cell._replace(linearise=None)
    return cell._replace(name=name, extra=tuple(extra), masks=tuple(m for m in _MASKS if m in variants))


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
    "readout",
    "rnn",
    "sequence",
]
