"""What a checkpoint must be to be gone on from: all of it is compared with what it is restored to, before any of it is used.

A checkpoint's digest says that the file is what somebody wrote, not that it belongs here: an optimiser's fused kernels take the
shapes of its state as given, and write beyond a tensor that is too small.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from throughtime.training.files import CheckpointError
from throughtime.training.schedule import Budget

MOST = 1e300  # stands in a checkpoint for infinity, which JSON hasn't
_MOST_STEPS = 2**53  # whole numbers up to here are exact as floats too

_COUNTS = ("step", "best_step", "validated_at", "without_improvement", "rolled_back", "clipped_steps")
_MEASURES = {"seconds": (0.0, MOST), "best": (-MOST, MOST), "rate_factor": (0.0, 1.0)}
_WATCHED = {"slow": (-MOST, MOST), "fast": (-MOST, MOST), "lowest": (-MOST, MOST)}
_STAGE = {"learning_rate": (0.0, MOST), "seconds": (0.0, MOST)}
_BUDGETS = ("minutes", "epochs", "steps")
_OTHERS = ("longer", "watch", "validations", "optimizer")


def check_tensors(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise unless tensors have the names, shapes and dtypes of others, and hold numbers.

    Args:
        given: What was read.
        expected: What it is read for; its numbers don't matter.
        prefix: What stands before each name in the message.

    Raises:
        CheckpointError: With the first tensor that differs, and in what.
    """
    for name in expected:
        if name not in given:
            raise CheckpointError(f"{prefix}{name} is missing")
    for name, tensor in given.items():
        if name not in expected:
            raise CheckpointError(f"{prefix}{name} is none of its tensors")
        _check_tensor(prefix + name, tensor, expected[name])


def _check_tensor(name: str, given: Tensor, expected: Tensor) -> None:
    for kind in ("shape", "dtype"):
        there, wanted = getattr(given, kind), getattr(expected, kind)
        if there != wanted:
            there, wanted = (tuple(there), tuple(wanted)) if kind == "shape" else (there, wanted)
            raise CheckpointError(f"{name} has {kind} {there}, expected {wanted}")
    if given.is_floating_point() and not given.isfinite().all():
        raise CheckpointError(f"{name} holds numbers that are none")


def check_state(state: Any) -> None:
    """Raise unless the JSON part of a loop's checkpoint holds what it must, each entry of its type and in its range.

    Raises:
        CheckpointError: With the first entry that doesn't.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"its state is a JSON {type(state).__name__}, expected an object")
    _check_names("", state, (*_COUNTS, *_MEASURES, *_OTHERS))
    for name in _COUNTS:
        _check_count(name, state[name], _MOST_STEPS)
    for name in ("validated_at", "clipped_steps"):
        _check_count(name, state[name], state["step"])
    for name, (least, most) in _MEASURES.items():
        _check_measure(name, state[name], least, most)
    if state["longer"] is not None:
        _check_stage(state["longer"], state)
    watch = state["watch"]
    _check_names("watch.", watch, (*_WATCHED, "steps"))
    _check_count("watch.steps", watch["steps"], _MOST_STEPS)
    for name, (least, most) in _WATCHED.items():
        _check_measure(f"watch.{name}", watch[name], least, most)
    validations = state["validations"]
    if not isinstance(validations, list) or not all(isinstance(v, float | int) for v in validations):
        raise CheckpointError("validations is not a list of numbers")


def _check_stage(stage: Any, state: dict[str, Any]) -> None:
    """Raise unless a stage began before what a state tells, and has a budget."""
    _check_names("longer.", stage, ("budget", "step", *_STAGE))
    _check_count("longer.step", stage["step"], state["step"])
    for name, (least, most) in _STAGE.items():
        _check_measure(f"longer.{name}", stage[name], least, state["seconds"] if name == "seconds" else most)
    _check_names("longer.budget.", stage["budget"], _BUDGETS)
    for name, amount in stage["budget"].items():
        if amount is not None:
            _check_measure(f"longer.budget.{name}", amount, 0.0, MOST)
    Budget(**stage["budget"])  # raises unless it is one


def _check_names(prefix: str, values: Any, names: tuple[str, ...]) -> None:
    if not isinstance(values, dict):
        raise CheckpointError(f"{prefix.rstrip('.')} is a JSON {type(values).__name__}, expected an object")
    for name in names:
        if name not in values:
            raise CheckpointError(f"{prefix}{name} is missing")
    for name in values:
        if name not in names:
            raise CheckpointError(f"{prefix}{name} is no entry of a state")


def _check_count(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise CheckpointError(f"{name} is {value!r}, expected a whole number from 0 to {most}")


def _check_measure(name: str, value: Any, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise CheckpointError(f"{name} is {value!r}, expected a number from {least:g} to {most:g}")


def optimizer_state(tensors: Mapping[str, Tensor], plain: dict[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return what an optimiser keeps for each of its parameters, put together from a checkpoint's two parts.

    Args:
        tensors: By "index.name".
        plain: By index and name, what is no tensor; an index for each parameter that had a step.

    Raises:
        CheckpointError: A part belongs to no parameter.
    """
    if not isinstance(plain, dict) or not all(isinstance(values, dict) for values in plain.values()):
        raise CheckpointError("optimizer isn't an object of objects")
    kept = {index: dict(values) for index, values in plain.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if index not in kept:
            raise CheckpointError(f"optimizer.{name} belongs to no parameter")
        kept[index][key] = tensor
    if not all(index.isdecimal() and index.isascii() and len(index) < 10 for index in kept):
        raise CheckpointError("optimizer has indices that are none")
    return {int(index): values for index, values in kept.items()}


def check_optimizer_state(optimizer: torch.optim.Optimizer, kept: dict[int, dict[str, Any]], step: int) -> None:
    """Raise unless an optimiser keeps such a state.

    Args:
        optimizer: What it is restored to.
        kept: By parameter and name.
        step: Steps done; no parameter can have had more.

    Raises:
        CheckpointError: With the first entry that the optimiser wouldn't keep.
    """
    usual = list(_kept_after_a_step(optimizer))
    if step and any(usual) and not kept:
        raise CheckpointError("nothing of the optimiser is in it")
    for index, values in kept.items():
        if index >= len(usual):
            raise CheckpointError(f"optimizer.{index} is none of its {len(usual)} parameters")
        _check_kept(f"optimizer.{index}.", values, usual[index], step)


def _check_kept(prefix: str, values: dict[str, Any], usual: dict[str, Any], step: int) -> None:
    _check_names(prefix, values, tuple(usual))
    for name, expected in usual.items():
        value = values[name]
        if isinstance(expected, Tensor) and isinstance(value, Tensor):
            _check_tensor(prefix + name, value, expected)
        elif type(value) is not type(expected):
            raise CheckpointError(f"{prefix}{name} is a {type(value).__name__}, expected a {type(expected).__name__}")
        if name == "step" and not 0 <= float(value) <= step:
            raise CheckpointError(f"{prefix}step is {float(value):g}, expected from 0 to {step}")


def _kept_after_a_step(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Yield what an optimiser keeps for each parameter, found by a step of a twin, one parameter at a time."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            stand_in = torch.zeros_like(parameter).requires_grad_()
            stand_in.grad = torch.zeros_like(parameter)
            twin = object.__new__(type(optimizer))
            vars(twin).update(vars(optimizer))
            twin.state, twin.param_groups = defaultdict(dict), [group | {"params": [stand_in]}]
            twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
            twin.step()
            yield twin.state[stand_in]


def check_generator(device: torch.device, state: Tensor) -> None:
    """Raise unless a random generator can be in a state.

    Raises:
        CheckpointError: It can't.
    """
    try:
        torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"rng.{device.type} is no state of a random generator") from error


def check_average(count: Tensor | None, step: int) -> None:
    """Raise if an average is of more weights than there were, or of less than none.

    Raises:
        CheckpointError: With the count.
    """
    if count is not None and not 0 <= int(count) <= step:
        raise CheckpointError(f"average.n_averaged is {int(count)}, expected from 0 to {step}")
