"""Initialisations that change how far gradients reach. Each works in place and returns its layer."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from throughtime.errors import InputError
from throughtime.layers import GRU, LSTM, Recurrent

Layer = TypeVar("Layer", bound=Recurrent)
Gated = TypeVar("Gated", LSTM, GRU)


@torch.no_grad()
def forget_bias_(layer: LSTM, value: float = 1.0) -> LSTM:
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
def chrono_(layer: Gated, max_lag: int) -> Gated:
    """Spread the memory time constants over 1 … `max_lag` steps (Tallec & Ollivier, 2018).

    With u ~ U[1, max_lag − 1], an LSTM's forget bias is ln u and its input bias −ln u; a GRU's update bias, which keeps h
    here, is ln u.

    Args:
        layer: An LSTM or a GRU with biases.
        max_lag: The longest dependency expected, in time steps, at least 3.

    Raises:
        InputError: `max_lag` is below 3, or the layer has no biases.
    """
    if max_lag < 3:
        raise InputError(f"max_lag = {max_lag}; expected the longest dependency in time steps, at least 3")
    is_coupled = isinstance(layer, LSTM) and layer.coupled  # f alone then says what i is
    gates = 4 if isinstance(layer, LSTM) and not is_coupled else 3
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


def _biases(layer: Recurrent) -> list[tuple[Tensor, Tensor]]:
    if not layer.bias:
        raise InputError(f"this {type(layer).__name__} has no biases to set; make it with bias=True")
    return [(row[2], row[3]) for row in layer.all_weights]


def _set_gate(bias_ih: Tensor, bias_hh: Tensor, *, gate: int, gates: int, value: Tensor) -> None:
    bias_ih.chunk(gates)[gate].copy_(value)
    bias_hh.chunk(gates)[gate].zero_()
