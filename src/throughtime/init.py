"""Initialisations that change how far gradients reach. Each works in place, on a layer or a cell, and returns it."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from throughtime.errors import InputError, unknown_name
from throughtime.layers import GRU, LSTM, Recurrent
from throughtime.steps import Cell, GRUCell, LSTMCell

Layer = TypeVar("Layer", bound=Recurrent | Cell)
OfLSTM = TypeVar("OfLSTM", LSTM, LSTMCell)
OfGRU = TypeVar("OfGRU", GRU, GRUCell)
Gated = TypeVar("Gated", LSTM, GRU, LSTMCell, GRUCell)


@torch.no_grad()
def forget_bias_(layer: OfLSTM, value: float = 1.0) -> OfLSTM:
    """Set the bias of every forget gate: σ(value) of c survives a step at the start (Gers et al., 2000; Jozefowicz et al., 2015).

    torch's two biases add up; the sum is set.

    Example:
        >>> import throughtime
        >>> layer = throughtime.init.forget_bias_(throughtime.LSTM(5, 8), 1.0)
        >>> (layer.bias_ih_l0 + layer.bias_hh_l0)[8:16].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    gates = 3 if layer.coupled else 4
    for bias_ih, bias_hh in _biases(layer):
        gate = torch.full_like(bias_ih[: layer.hidden_size], value)
        _set_gate(bias_ih, bias_hh, gate=gates - 3, gates=gates, value=gate)
    return layer


@torch.no_grad()
def update_bias_(layer: OfGRU, value: float = 1.0) -> OfGRU:
    """Set the bias of every update gate, which keeps h here: σ(value) of h survives a step at the start (Tallec & Ollivier, 2018).

    torch's two biases add up; the sum is set.

    Example:
        >>> import throughtime
        >>> layer = throughtime.init.update_bias_(throughtime.GRU(5, 4), 3.0)
        >>> (layer.bias_ih_l0 + layer.bias_hh_l0)[4:8].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    for bias_ih, bias_hh in _biases(layer):
        _set_gate(bias_ih, bias_hh, gate=1, gates=3, value=torch.full_like(bias_ih[: layer.hidden_size], value))
    return layer


@torch.no_grad()
def chrono_(layer: Gated, max_lag: int) -> Gated:
    """Spread the memory time constants over 1 … `max_lag` steps (Tallec & Ollivier, 2018).

    With u ~ U[1, max_lag − 1], an LSTM's forget bias is ln u and its input bias −ln u; a GRU's update bias, which keeps h
    here, is ln u.

    Args:
        layer: An LSTM or a GRU, or a cell of one, with biases.
        max_lag: The longest dependency expected, in time steps, at least 3.

    Raises:
        InputError: `max_lag` is below 3, or the layer has no biases.
    """
    if max_lag < 3:
        raise InputError(f"max_lag = {max_lag}; expected the longest dependency in time steps, at least 3")
    is_coupled = isinstance(layer, LSTM | LSTMCell) and layer.coupled  # f alone then says what i is
    gates = 4 if isinstance(layer, LSTM | LSTMCell) and not is_coupled else 3
    for bias_ih, bias_hh in _biases(layer):
        keep = torch.empty_like(bias_ih[: layer.hidden_size]).uniform_(1, max_lag - 1).log_()
        _set_gate(bias_ih, bias_hh, gate=0 if is_coupled else 1, gates=gates, value=keep)
        if gates == 4:
            _set_gate(bias_ih, bias_hh, gate=0, gates=gates, value=-keep)
    return layer


def orthogonal_(layer: Layer, gain: float = 1.0) -> Layer:
    """Make each gate's block of `weight_hh` orthogonal times `gain`: norms neither grow nor shrink by it (Saxe et al., 2014).

    A projected LSTM's blocks (H, P) get orthonormal columns.
    """
    for row in layer.all_weights:
        for block in row[1].detach().chunk(row[1].shape[0] // layer.hidden_size):
            nn.init.orthogonal_(block, gain)
    return layer


def initialise_(layer: Layer, names: str) -> Layer:
    """Apply initialisations by name, as the command line takes them.

    Args:
        layer: The layer.
        names: One of `default` (leave it as it is), `orthogonal[:gain]`, `forget:bias` (LSTM), `update:bias` (GRU) and
            `chrono:max_lag` (LSTM, GRU), or several joined by "+".

    Raises:
        InputError: A name is unknown, a value is no number, or the layer is not one that it is for.

    Example:
        >>> import throughtime
        >>> layer = throughtime.init.initialise_(throughtime.LSTM(5, 4), "orthogonal+forget:1")
        >>> (layer.bias_ih_l0 + layer.bias_hh_l0)[4:8].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    for part in names.split("+"):
        name = part.partition(":")[0]
        if name not in _NAMED:
            raise unknown_name("initialisation", name, _NAMED)
        kinds, apply, value = _NAMED[name]
        if not isinstance(layer, kinds):
            fitting = " and ".join(kind.__name__ for kind in kinds if issubclass(kind, Recurrent))
            raise InputError(f"initialisation {part!r} is for {fitting}, not for {type(layer).__name__}")
        apply(layer, _number_of(part) if ":" in part or name == "chrono" else value)
    return layer


def initialise_model_(model: nn.Module, names: str) -> nn.Module:
    """Apply initialisations by name, as `initialise_` takes them, to every recurrent layer and cell of a model; return it."""
    for layer in model.modules():
        if isinstance(layer, Recurrent | Cell):
            initialise_(layer, names)
    return model


def _number_of(part: str) -> float:
    """Return the number of an initialisation's name, as in "forget:1"."""
    name, _, given = part.partition(":")
    with contextlib.suppress(ValueError):
        if abs(value := float(given)) <= _LARGEST:  # neither infinity nor NaN is
            return value
    raise InputError(
        f"initialisation {part!r}: expected a number after the colon, of at most {_LARGEST:g}, as in {name}:3"
    )


_LARGEST = 1e9
_NAMED: dict[str, tuple[tuple[type[nn.Module], ...], Callable[..., object], float | None]] = {
    "default": ((Recurrent, Cell), lambda layer, _: layer, None),
    "orthogonal": ((Recurrent, Cell), orthogonal_, 1.0),
    "forget": ((LSTM, LSTMCell), forget_bias_, 1.0),
    "update": ((GRU, GRUCell), update_bias_, 1.0),
    "chrono": ((LSTM, GRU, LSTMCell, GRUCell), lambda layer, max_lag: chrono_(layer, int(max_lag)), None),
}


def _biases(layer: Recurrent | Cell) -> list[tuple[Tensor, Tensor]]:
    if not layer.bias:
        raise InputError(f"this {type(layer).__name__} has no biases to set; make it with bias=True")
    return [(row[2], row[3]) for row in layer.all_weights]


def _set_gate(bias_ih: Tensor, bias_hh: Tensor, *, gate: int, gates: int, value: Tensor) -> None:
    bias_ih.chunk(gates)[gate].copy_(value)
    bias_hh.chunk(gates)[gate].zero_()
