"""What code that knows torch.nn's recurrent layers reads of one, and sets: the class that they share, without its caches.

torch.nn's layers keep lists of their weights beside the weights, and renew them when a weight is exchanged. Here the same names are
computed from the weights that there are, so they can't be stale; what is set through them is set on the layer, or refused.
"""

from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from throughtime import spec
from throughtime.errors import InputError
from throughtime.spec import Spec

# torch's classes as they are now: somebody may put throughtime's in their places, as `torch.nn.LSTM = throughtime.LSTM`.
TORCH_RNN, TORCH_LSTM, TORCH_GRU = nn.RNN, nn.LSTM, nn.GRU
MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")

# What draws or mixes beyond the cell's equations, and how a layer is computed; with the values that leave all as it is in torch.nn.
_DRAWING = {"zoneout": 0.0, "recurrent_dropout": 0.0, "weight_drop": 0.0}
_COMPUTING = {"backend": "auto", "recompute_every": 0}
_OWN = ("_spec", "_names", "layer_norm", *_COMPUTING, *_DRAWING)
# What torch's layers keep, and ours compute or don't need.
_LISTS = ("mode", "nonlinearity", "_flat_weights", "_flat_weights_names", "_all_weights", "all_weights")
_CACHES = ("_flat_weight_refs", "_data_ptrs")


class RNNBase(nn.RNNBase):
    """torch.nn's RNNBase in name and in what it answers; nothing of its initialisation, its caches and its pickles.

    A subclass sets `_spec`, `_names` (of each layer and direction its parameters' names, by those in `spec.Parameters`), and
    torch's own attributes.
    """

    _spec: Spec
    _names: list[dict[str, str]]

    # torch.nn's RNNBase has these keep its lists up to date.
    __setattr__ = nn.Module.__setattr__  # pyright: ignore[reportAssignmentType]
    _apply = nn.Module._apply  # pyright: ignore[reportAssignmentType]
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel  # pyright: ignore[reportAssignmentType]

    @property
    def mode(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Its cell, as torch names it: "RNN_TANH", "RNN_RELU", "LSTM" or "GRU".

        Of what no layer of torch.nn computes it is another name, as "LSTM+PEEPHOLES", so that whoever computes by it finds none.
        """
        drawing = [name for name in _DRAWING if _has_any(getattr(self, name))]
        return "+".join([self._spec.name, *drawing]).upper()

    @mode.setter
    def mode(self, mode: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if mode.startswith("RNN_") and mode in MODES and self._spec.base.startswith("rnn_"):
            self._spec = spec.read("+".join([mode.lower(), *self._spec.variants]))
        elif mode != self.mode:
            raise ValueError(f"mode = {mode!r}; this layer is {self.mode!r}, which can't be changed")

    @property
    def all_weights(self) -> list[list[Tensor]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The parameters of each layer and direction, in torch's order; then those that a variant brings."""
        return [[getattr(self, name) for name in row.values()] for row in self._names]

    @property
    def _all_weights(self) -> list[list[str]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [list(row.values()) for row in self._names]

    @property
    def _flat_weights_names(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [name for row in self._names for name in row.values()]

    @property
    def _flat_weights(self) -> "FlatWeights":  # pyright: ignore[reportIncompatibleVariableOverride]
        return FlatWeights(self)

    @_flat_weights.setter
    def _flat_weights(self, weights: Iterable[Tensor | None]) -> None:
        _set_weights(self, dict(zip(self._flat_weights_names, weights, strict=True)))

    def flatten_parameters(self) -> None:
        """Do nothing. Code written for torch.nn calls it; these layers need no contiguous weights."""

    def _init_flat_weights(self) -> None:
        """Do nothing: the list is made anew whenever it is asked for."""

    def _update_flat_weights(self) -> None:
        """Do nothing, as above."""

    def _weights_have_changed(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state if "_spec" in state else fields_from_torch(type(self), state))


class FlatWeights(list[Tensor | None]):
    """The weights of a layer in a row, `None` for one that isn't there; to set one sets it on the layer."""

    def __init__(self, layer: RNNBase) -> None:
        super().__init__(getattr(layer, name, None) for name in layer._flat_weights_names)
        self._layer = layer

    def __setitem__(self, place: SupportsIndex | slice, value: Any) -> None:
        super().__setitem__(place, value)
        _set_weights(self._layer, dict(zip(self._layer._flat_weights_names, self, strict=True)))


def fields_from_torch(kind: type, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a layer of ours from those of one of torch.nn's, of any version: an object's or a pickle's.

    Args:
        kind: What it will be: torch's own attributes are those that are computed there.
        state: Its `__dict__`; parameters, buffers, hooks and whatever somebody has put there go along.

    Raises:
        InputError: These aren't the attributes of one, or one that somebody has put there has a name that ours need.
    """
    mode = state.get("mode")
    if mode not in MODES:
        raise InputError(f"has mode = {mode!r}; expected a layer of torch.nn: {', '.join(MODES)}")
    taken = [name for name in state if name in _OWN or (is_computed(kind, name) and name not in _LISTS)]
    if taken:
        raise InputError(
            f"has an attribute {taken[0]!r} of somebody's, a name that throughtime's layers use themselves"
        )
    proj_size = state.get("proj_size", 0)  # pickles of torch 1.7 have none
    parts = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bool(state["bias"]) + ["weight_hr"] * bool(proj_size)
    ways = ("", "_reverse")[: 2 if state["bidirectional"] else 1]
    own = {
        "_spec": spec.read(mode.lower()),
        "_names": [
            {part: f"{part}_l{layer}{way}" for part in parts} for layer in range(state["num_layers"]) for way in ways
        ],
        "proj_size": proj_size,
        "layer_norm": False,
        **_COMPUTING,
        **_DRAWING,
    }
    kept = {name: value for name, value in state.items() if name not in (*_LISTS, *_CACHES)}
    return {**kept, **own}


def fields_for_torch(kind: type[nn.RNNBase], layer: RNNBase) -> dict[str, Any]:
    """Return the attributes of a layer of torch.nn's that computes what one of ours does, whose mode is one of torch's.

    Its lists of weights are yet to be made, by `_init_flat_weights()`.
    """
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional"]
    names += {"LSTM": ["proj_size"], "GRU": []}.get(layer.mode, ["nonlinearity"])
    shell = kind(**{name: getattr(layer, name) for name in names}, device="meta")
    own = {name: value for name, value in vars(shell).items() if name not in vars(nn.Module())}
    kept = {name: value for name, value in vars(layer).items() if name not in _OWN}
    return {**kept, **own, "dropout": layer.dropout}


def as_torch_layer(layer: RNNBase) -> nn.RNNBase:
    """Return a new layer of torch.nn's with the parameters of one of ours that has a mode of torch's and isn't parametrized."""
    kind = {"LSTM": TORCH_LSTM, "GRU": TORCH_GRU}.get(layer.mode, TORCH_RNN)
    made = kind.__new__(kind)
    vars(made).update(fields_for_torch(kind, layer))
    made._init_flat_weights()
    return made


def is_computed(kind: type, name: str) -> bool:
    """Whether an attribute is a property of a class."""
    return isinstance(getattr(kind, name, None), property)


def _set_weights(layer: RNNBase, weights: Mapping[str, Tensor | None]) -> None:
    for name, tensor in weights.items():
        current = getattr(layer, name, None)
        if tensor is None or tensor is current:
            continue
        # A parametrized weight is another tensor each time.
        if not is_computed(type(layer), name) or not torch.equal(tensor, getattr(layer, name)):
            setattr(layer, name, tensor)


def _has_any(probability: float | tuple[float, float]) -> bool:
    return any(probability) if isinstance(probability, tuple) else probability > 0
