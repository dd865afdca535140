"""torch.ao's dynamic quantisation of the layers: to torch's own quantised LSTM and GRU, or a warning that a layer stays in float.

torch.ao looks classes up in tables and leaves what isn't there as it is, without a word. It marks each module with a `qconfig`
before that, which is where a layer says what will become of it.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from throughtime.rnn_base import RNNBase, as_torch_layer

_OTHERWISE = "throughtime.stream(model, precision='int8') has an int8 of its own"


class Dynamic(nn.Module):
    """What torch.ao asks for a quantised layer in place of an LSTM or GRU of ours."""

    @classmethod
    def from_float(cls, layer: RNNBase, use_precomputed_fake_quant: bool = False) -> nn.Module:
        """Return torch's dynamically quantised layer with the weights of ours, whose `qconfig` says how."""
        from torch.ao.nn.quantized import dynamic

        kind = {"LSTM": dynamic.LSTM, "GRU": dynamic.GRU}[layer.mode]
        stands_for_torchs = type(layer) in (nn.LSTM, nn.GRU)  # as it does after `torch.nn.LSTM = throughtime.LSTM`
        return kind.from_float(layer if stands_for_torchs else as_torch_layer(layer))


def register(*kinds: type[RNNBase]) -> None:
    """Enter classes in torch.ao's table for dynamic quantisation, where this version of torch has one."""
    try:
        from torch.ao.quantization.quantization_mappings import DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS as table
    except ImportError:
        return
    table.update(dict.fromkeys(kinds, Dynamic))


def accepted(layer: RNNBase, qconfig: Any) -> Any:
    """Return what torch.ao's `qconfig` of a layer is to be: as it is, or `None` where the layer can't be quantised by it.

    Warns:
        UserWarning: The layer stays in float.
    """
    name = f"throughtime.{type(layer).__name__}"
    if reason := _refusal(layer):
        warnings.warn(f"torch.ao leaves a {name} in float: {reason}; {_OTHERWISE}", stacklevel=2)
        return None
    if qconfig is None:
        advice = f"name {name} in quantize_dynamic's qconfig_spec, or quantise throughtime.to_torch(model)"
        warnings.warn(
            f"torch.ao leaves a {name} in float, since it wasn't asked for: {advice}; {_OTHERWISE}", stacklevel=2
        )
    elif not getattr(qconfig.activation(), "is_dynamic", False):
        advice = "quantise throughtime.to_torch(model), or leave it out"
        warnings.warn(
            f"torch.ao leaves a {name} in float, since it knows no static quantisation of it: {advice}", stacklevel=2
        )
        return None
    return qconfig


def refuse(cell: nn.Module) -> None:
    """Say that torch.ao has nothing to put in a cell's place.

    Warns:
        UserWarning: The cell stays in float.
    """
    name = f"throughtime.{type(cell).__name__}"
    advice = "quantise throughtime.to_torch(model)"
    warnings.warn(f"torch.ao leaves a {name} in float, since it knows torch.nn's: {advice}", stacklevel=3)


def check_tracer(layer: nn.Module, tracer: object) -> None:
    """Warn where torch.ao traces a model to quantise it: it leaves the layer in float."""
    if type(tracer).__module__.startswith("torch.ao."):
        name = f"throughtime.{type(layer).__name__}"
        warnings.warn(
            f"torch.ao leaves a {name} in float where it traces a model: quantise throughtime.to_torch(model); {_OTHERWISE}",
            stacklevel=2,
        )


def _refusal(layer: RNNBase) -> str | None:
    """Return why torch has no dynamically quantised layer that computes what one of ours does, or `None`."""
    if layer.mode not in ("LSTM", "GRU"):
        return f"it is {layer.mode}, and torch.ao has LSTM and GRU"
    if parametrize.is_parametrized(layer):
        return "it is parametrized; remove_parametrizations first"
    if layer.proj_size or not layer.bias:
        return "torch.ao's has " + ("no projection" if layer.proj_size else "biases, and this one has none")
    if layer.all_weights[0][0].dtype != torch.float32:
        return f"it is {layer.all_weights[0][0].dtype}; expected float32, as by model.float()"
    return None
