"""torch.nn's recurrent layers and cells of a model made throughtime's where they are, and back."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from throughtime import steps
from throughtime.errors import InputError, unknown_name
from throughtime.layers import GRU, LSTM, RNN
from throughtime.rnn_base import (
    MODES,
    TORCH_GRU,
    TORCH_LSTM,
    TORCH_RNN,
    RNNBase,
    fields_for_torch,
    fields_from_torch,
)

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger(__name__)


class _Pair(NamedTuple):
    """A class of torch.nn and ours in its place, and how the attributes of one become those of the other."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    from_torch: Callable[[type, Mapping[str, Any]], dict[str, Any]] = fields_from_torch
    for_torch: Callable[[Any, Any], dict[str, Any]] = fields_for_torch


_CELLS = steps.fields_from_torch, steps.fields_for_torch
_PAIRS = (
    *(_Pair(TORCH_RNN, RNN), _Pair(TORCH_LSTM, LSTM), _Pair(TORCH_GRU, GRU)),
    _Pair(steps.TORCH_RNN_CELL, steps.RNNCell, *_CELLS),
    _Pair(steps.TORCH_LSTM_CELL, steps.LSTMCell, *_CELLS),
    _Pair(steps.TORCH_GRU_CELL, steps.GRUCell, *_CELLS),
)
_RECURRENT = (RNNBase, steps.Cell, *(pair.theirs for pair in _PAIRS), *(pair.ours for pair in _PAIRS))


class _Change(NamedTuple):
    """What a module is to become: its class, and its attributes."""

    path: str
    module: nn.Module
    kind: type[nn.Module]
    fields: dict[str, Any]


def convert(model: Model, *, leave: Iterable[str] = ()) -> Model:
    """Make every `torch.nn.RNN`, `LSTM` and `GRU` of a model, and every cell of theirs, throughtime's, in place; return the model.

    Each layer stays the object that it is, and so do its parameters: optimisers, hooks, parametrizations, tied weights, a layer
    that is used in two places, gradients, dtypes, devices, names and flags are as before; who holds a layer holds the new one.
    It computes the same, faster, and takes `lengths=` and `reset=` besides. What was changed is logged by "throughtime.conversion"
    at level INFO, a line for each layer.

    It is all or nothing: where one layer can't be changed, none is. That is so where its class is derived from torch's, since
    what that class does can't be told, and where somebody has replaced its `forward`.

    Args:
        model: The model, or a layer.
        leave: Paths of layers to be left as they are, as in `model.named_modules()`.

    Raises:
        InputError: A layer can't be changed, which is named with the reason, or there is none at a path of `leave`.

    Warns:
        UserWarning: There is no such layer, neither torch.nn's nor ours.

    Example:
        >>> import torch, throughtime
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 5), torch.nn.LSTM(5, 8))
        >>> throughtime.convert(model)[1]
        LSTM(5, 8)
        >>> type(model[1]) is throughtime.LSTM
        True
    """
    return _change_all(model, _to_ours, leave, "torch.nn")


def to_torch(model: Model, *, leave: Iterable[str] = ()) -> Model:
    """Make every `throughtime.RNN`, `LSTM` and `GRU` of a model, and every cell of theirs, torch.nn's, in place; return the model.

    For what knows torch.nn's layers only: `torch.jit.script`, quantisation by `torch.ao`, tools that look classes up. Everything
    is kept as by `convert`, which takes it back, but for `backend` and `recompute_every`, which choose how to compute. torch.nn's
    layers take no `lengths=`, `reset=`, `embedding=` and no token ids: a model that gives them these fails when it is called.

    Args:
        model: The model, or a layer. Of a copy (`copy.deepcopy`) the original stays as it is.
        leave: Paths of layers to be left as they are.

    Raises:
        InputError: A layer computes what none of torch.nn does (an MGU, `reset_after=False`, layer norm, peepholes, coupled gates,
            zoneout, recurrent dropout, weight drop), or can't be changed as in `convert`. None is changed then.

    Warns:
        UserWarning: There is no such layer, neither torch.nn's nor ours.

    Example:
        >>> import torch, throughtime
        >>> throughtime.to_torch(throughtime.GRU(5, 8, batch_first=True))
        GRU(5, 8, batch_first=True)
        >>> throughtime.to_torch(torch.nn.Sequential(throughtime.LSTM(5, 8, peepholes=True)))
        Traceback (most recent call last):
        throughtime.errors.InputError: 0 is LSTM+PEEPHOLES, which torch.nn doesn't have; leave=['0'] leaves it as it is
    """
    return _change_all(model, _to_theirs, leave, "throughtime")


def _change_all(
    model: Model,
    change: Callable[[nn.Module], tuple[type[nn.Module], dict[str, Any]] | None],
    leave: Iterable[str],
    of: str,
) -> Model:
    """Find out what each layer is to become, before any is changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    left = {leave} if isinstance(leave, str) else set(leave)
    paths = _paths(model)
    known = [path for own in paths.values() for path in own if path]
    if unknown := sorted(left.difference(known)):
        raise unknown_name("module in leave", unknown[0], known)
    changes: list[_Change] = []
    for module, own in paths.items():
        if left.intersection(own):
            continue
        try:
            changed = change(module)
        except InputError as error:
            reason = f"{own[0] or f'the model, a {type(model).__name__},'} {error}"
            raise InputError(reason + f"; leave={own[:1]} leaves it as it is" * bool(own[0])) from None
        if changed is not None:
            changes.append(_Change(own[0], module, *changed))
    if not changes and not any(isinstance(module, _RECURRENT) for module in paths):
        warnings.warn(f"{type(model).__name__} has no recurrent layer of {of}; nothing was changed", stacklevel=3)
    for path, module, kind, fields in changes:
        before = _name(parametrize.type_before_parametrizations(module))
        _become(module, kind, fields)
        _log.info("%s: %s is now %s", path or "the model", before, _name(kind))
    return model


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module with the paths that lead to it: a shared one has several."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def _to_ours(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """Return what a layer of torch.nn's is to become, or `None` for any other module."""
    for pair in _PAIRS:
        if not isinstance(module, pair.theirs) or isinstance(module, pair.ours):
            continue
        _check_is_plain(module, pair.theirs)
        return pair.ours, pair.from_torch(pair.ours, vars(module))
    return None


def _to_theirs(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """Return what a layer of ours is to become, or `None` for any other module."""
    if isinstance(module, RNNBase | steps.Cell) and module.mode not in MODES:
        raise InputError(f"is {module.mode}, which torch.nn doesn't have")
    for pair in _PAIRS:
        if isinstance(module, pair.ours):
            _check_is_plain(module, pair.ours)
            return pair.theirs, pair.for_torch(pair.theirs, module)
    return None


def _check_is_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """Check that a module computes what its class says."""
    actual = parametrize.type_before_parametrizations(module)
    if actual is not kind:
        raise InputError(f"is {_name(actual)}, derived from {_name(kind)}: what that class adds would be lost")
    if "forward" in vars(module):
        raise InputError("has a forward of its own in place of its class's")


def _become(module: nn.Module, kind: type[nn.Module], fields: dict[str, Any]) -> None:
    """Exchange class and attributes of a module. Where it is parametrized, its class is a subclass made for it alone."""
    old = type(module)
    if parametrize.is_parametrized(module):
        own = {name: value for name, value in vars(old).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    vars(module).clear()
    vars(module).update(fields)
    object.__setattr__(module, "__class__", kind)
    if not isinstance(module, RNNBase) and isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _name(kind: type) -> str:
    """Return the name by which a class is known."""
    packages = {pair.theirs: "torch.nn" for pair in _PAIRS} | {pair.ours: "throughtime" for pair in _PAIRS}
    return f"{packages[kind]}.{kind.__name__}" if kind in packages else f"{kind.__module__}.{kind.__qualname__}"
