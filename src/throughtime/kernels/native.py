"""The native module: whether it is there, what it serves and with which instructions, and memory for its arrays."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.errors import InputError, MissingKernelsWarning
from throughtime.spec import Spec

module: Any = None
missing: str | None = None  # why the module isn't there
try:
    module = import_module("throughtime.kernels._native")
except ModuleNotFoundError:
    missing = "throughtime is installed without its C++ kernels"
except ImportError as error:
    missing = f"throughtime's C++ kernels can't be loaded ({error})"

ADVICE = (
    "install a C++17 compiler (g++ or clang++), then throughtime again with pip's --force-reinstall --no-cache-dir -v, "
    "which says what stops the build"
)

INSTRUCTION_SET_VARIABLE = "THROUGHTIME_INSTRUCTION_SET"

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_NUMBERS = {} if module is None else {name: number for number, name in enumerate(module.cells())}


def description() -> str:
    """Say in a line what the kernels are, and what of this CPU the build leaves unused."""
    unbuilt = [name.upper().replace("_", "-") for name in _unbuilt_instruction_sets()]
    lost = f"; this CPU has {' and '.join(unbuilt)}, which the compiler of this build didn't know" if unbuilt else ""
    return f"C++ kernels for the CPU, {instruction_set()}{lost}"


def warn_of_absence() -> None:
    """Say once in a process, at the line outside that computes, that there are no kernels, what that costs and what to do."""
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "throughtime",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{missing}, so layers on the CPU take up to several times longer; {ADVICE}",
        MissingKernelsWarning,
        stacklevel=level,
    )


_has_warned = False
# While a graph is traced it is called, not traced. torch.compiler.assume_constant_result sets this too, and imports all of dynamo.
warn_of_absence._dynamo_marked_constant = True  # type: ignore[attr-defined]


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state, sums and pointwise arithmetic."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def instruction_set() -> str:
    """Name the instruction set in use: avx512_bf16, avx512, avx2 or generic."""
    return module.instruction_set()


def instruction_sets() -> list[str]:
    """Name those that this machine can run, the fastest first."""
    return module.instruction_sets()


def use_instruction_set(name: str) -> None:
    """Use another instruction set from now on, in the whole process: for tests and measurements."""
    module.use_instruction_set(name)


def _use_what_the_environment_names() -> None:
    """Use the instruction set that `THROUGHTIME_INSTRUCTION_SET` names, instead of the fastest."""
    name = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if name and module is not None:
        if name not in instruction_sets():
            raise InputError(f"{INSTRUCTION_SET_VARIABLE}={name}: expected one of {', '.join(instruction_sets())}")
        use_instruction_set(name)


_use_what_the_environment_names()


def _unbuilt_instruction_sets() -> list[str]:
    """Name those, faster than any other, that this machine could run and the compiler of this build didn't know."""
    return module.unbuilt_instruction_sets()


class MemoryUse(NamedTuple):
    """Bytes of pooled memory: in arrays that somebody still holds, and kept for the next ones."""

    used: int
    idle: int


def memory_use() -> MemoryUse:
    """Say how much memory the kernels' large arrays take."""
    return MemoryUse(*module.memory_use())


class Meetings(NamedTuple):
    """Native passes for several threads since the process began: those that had them, and those that worked alone."""

    teams: int
    alone: int


def meetings() -> Meetings:
    """Say how often passes found other threads' cores taken by somebody else, and did without."""
    return Meetings(*module.meetings())


def release_memory() -> None:
    """Hand memory that is kept for the next call back to the system."""
    module.release_memory()


def fill_blocks(value: bool) -> None:
    """Fill the kernels' own memory with NaNs from now on: for tests, which then see who reads what nobody has written."""
    module.fill_blocks(value)


def pool_from(size: int) -> None:
    """Keep arrays of so many bytes and more for the next ones, from now on: for tests, of small ones."""
    module.pool_from(size)


def use_own_threads(value: bool) -> None:
    """Use threads of the kernels' own, not OpenMP's, from now on: for tests of processes that have no OpenMP."""
    module.use_own_threads(value)


@cache
def kind(dtype: torch.dtype) -> Any:
    """Return the native code for arrays of a dtype."""
    names = {torch.float32: "LayoutF32", torch.float64: "LayoutF64", torch.bfloat16: "LayoutBf16"}
    return getattr(module, names[dtype])


class Saved(NamedTuple):
    """An array that a forward pass saves for the backward pass, with a row for each real step.

    Attributes:
        name: Its name in a native pass.
        hiddens: How many H wide it is.
        others: How many numbers more there are in a row.
        is_wide: Whether they have the dtype of arithmetic, and not the request's.
    """

    name: str
    hiddens: int
    others: int
    is_wide: bool

    def width(self, hidden: int) -> int:
        """Return the columns of the array."""
        return self.hiddens * hidden + self.others


class Cell(NamedTuple):
    """What the native side says of a cell, with its variants.

    Attributes:
        number: By which it is called.
        saved: What a forward pass saves, beside input and output.
        gradient_gates: How many H of gradients the backward loop writes for a row.
        has_own_bias_hh: Whether the gradients of the two biases differ.
    """

    number: int
    saved: tuple[Saved, ...]
    gradient_gates: int
    has_own_bias_hh: bool


def knows(spec: Spec) -> bool:
    """Whether there are kernels for a cell."""
    return spec.base in _NUMBERS


@lru_cache
def cell(spec: Spec) -> Cell:
    """Return what the native side says of a cell."""
    number, is_variant = _NUMBERS[spec.base], bool(spec.variants)
    saved = module.saved(number, spec.gates, is_variant=is_variant, is_normalised=spec.is_normalised)
    gates = module.gradient_gates(number, spec.gates, is_variant=is_variant)
    return Cell(number, tuple(Saved(*it) for it in saved), gates, module.has_own_bias_hh(number))


def new(like: Tensor, *shape: int) -> Tensor:
    """Return an array of arbitrary content, as `like.new_empty`, but in pooled memory if it is large."""
    tensor = kind(like.dtype).new_array(shape) if like.dtype in DTYPES else None
    if tensor is None:
        return like.new_empty(shape)
    if torch.are_deterministic_algorithms_enabled():  # as torch fills its own
        tensor.fill_(torch.nan)
    return tensor


def new_zeros(like: Tensor, *shape: int) -> Tensor:
    """Return zeros, as `like.new_zeros`, without torch's threads: beside a busy process they may come late (csrc/threads.h)."""
    tensor = new(like, *shape)
    module.clear(tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())
    return tensor


def contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor as it is read by address: without gaps, and its elements' signs in its memory."""
    return tensor.resolve_neg().contiguous()


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's first element is, or 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def memory_of(*tensors: Tensor) -> list[Any]:
    """What keeps tensors' memory alive, even if other threads exchange a tensor's `data` while the kernels run."""
    return [tensor.untyped_storage() for tensor in tensors]


def addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Addresses by name."""
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def address_pair(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Addresses of the one or two parts of a state, or of none."""
    if len(tensors) == 2:
        return tensors[0].data_ptr(), tensors[1].data_ptr()
    return (tensors[0].data_ptr() if tensors else 0), 0
