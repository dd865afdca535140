"""Who watches torch's operators: the one place for torch's private names.

Where a version of torch has one of them no more, the answer is the careful one: watched, and transformed. Calls then go by torch's
dispatcher, or are computed by the equations, and are right.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _private(module: str, name: str, otherwise: Any) -> Callable[..., Any]:
    """Return a function of torch's, or one that returns `otherwise` where it isn't there."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return lambda *_: otherwise


_are_transforms_on = _private("torch._C", "_are_functorch_transforms_active", True)
_count_dispatch_modes = _private("torch._C", "_len_torch_dispatch_stack", 1)
_count_function_modes = _private("torch._C", "_len_torch_function_stack", 1)
_tracing_state = _private("torch._C", "_get_tracing_state", True)
_is_profiled = _private("torch._C._autograd", "_profiler_enabled", True)
_is_batched = _private("torch._C._functorch", "is_legacy_batchedtensor", True)
_LEVELS = (
    *("get_interpreter_stack", "is_functorch_wrapped_tensor", "is_batchedtensor", "get_unwrapped"),
    "maybe_get_bdim",
)
_interpreters, _is_wrapped, _is_one_of_many, _unwrap, _mapped_axis = (
    _private("torch._C._functorch", n, None) for n in _LEVELS
)
_knows_levels = all(hasattr(getattr(torch._C, "_functorch", None), name) for name in _LEVELS)
_is_fake = _private("torch._subclasses.fake_tensor", "is_fake", False)
_knows_forward_mode = hasattr(forward_ad, "_current_level")
PLAIN = {Tensor, torch.nn.Parameter, type(None)}

# Within it, torch's operators are called below autograd; `None` where this version of torch has no such thing.
below_autograd: Callable[[], contextlib.AbstractContextManager[Any]] | None = getattr(
    torch._C, "_AutoDispatchBelowAutograd", None
)


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is on."""
    return _are_transforms_on() or not _knows_forward_mode or forward_ad._current_level >= 0


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at: none has any on "meta", under FakeTensorMode and while a graph is compiled.

    In a trace of torch.jit's, of `make_fx` or `torch.func.linearize` there are some, but the graph is to serve others.
    """
    if tensor.is_meta or torch.compiler.is_compiling() or is_jit_traced() or _is_fx_traced():
        return False
    return type(tensor) in PLAIN or not _is_fake(tensor)


def is_watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call must go by torch's dispatcher: it is traced, recorded or profiled, or tensors only stand for others."""
    return (
        torch.compiler.is_compiling()
        or _count_dispatch_modes() > 0
        or _count_function_modes() > 0
        or _are_transforms_on()
        or is_jit_traced()
        or _is_profiled()
        or not PLAIN.issuperset(map(type, tensors))
    )


def is_jit_traced() -> bool:
    """Whether `torch.jit.trace` is looking on."""
    return _tracing_state() is not None


def _is_fx_traced() -> bool:
    """Whether `make_fx`, or what is made of it, is looking on."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and getattr(tracer, "get_proxy_mode", lambda: True)() is not None


def is_exported_to_onnx() -> bool:
    """Whether one of torch's exporters to ONNX is at work; while torch.compile looks on, nobody asks."""
    exporters = sys.modules.get("torch.onnx")  # torch imports it when it is first used
    return exporters is not None and not torch.compiler.is_dynamo_compiling() and exporters.is_in_onnx_export()


def leave_to_inductor(operator: Any) -> None:
    """Let torch.compile's Inductor, where it is loaded, call an operator as it is, though torch's table decomposes it for others.

    Told nothing, it does so too, except where the environment has `CI` set: there it refuses operators that stand in that table.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in getattr(lowering, "lowerings", (operator,)):
        return
    with contextlib.suppress(AttributeError, TypeError):  # of a version of torch that is told otherwise
        constraint = lowering.tag_to_layout_constraint(lowering.get_layout_constraint_tag(operator, with_default=True))
        lowering.make_fallback(operator, constraint, warn=False)


def are_batched(gradients: Sequence[Tensor | None]) -> bool:
    """Whether these are many gradients each, as `torch.autograd.grad(is_grads_batched=True)` gives them."""
    return any(gradient is not None and _is_batched(gradient) for gradient in gradients)


def transforms() -> frozenset[str]:
    """Return the kinds of torch.func's transforms that are on, such as "Grad" and "Vmap".

    "Other" stands for what can't be told, for forward mode outside torch.func, and for all that is traced.
    """
    if not is_transformed():
        return frozenset()
    if torch.compiler.is_compiling() or not _knows_levels or not _knows_forward_mode or forward_ad._current_level >= 0:
        return frozenset({"Other"})
    return frozenset(interpreter.key().name for interpreter in _interpreters() or ())


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of many to `torch.func.vmap`, at any level; none is while a graph is compiled."""
    while not torch.compiler.is_compiling() and _is_wrapped(tensor):
        if _is_one_of_many(tensor):
            return True
        tensor = _unwrap(tensor)
    return False


def is_copy(tensor: Tensor) -> bool:
    """Whether a tensor is one of many that are the same memory to the one `torch.func.vmap` that is on: an `expand` made them."""
    if len(_interpreters() or ()) != 1 or not _is_one_of_many(tensor):
        return False
    every, axis = _unwrap(tensor), _mapped_axis(tensor)
    return every.stride(axis) == 0 or every.shape[axis] == 1


def values(tensor: Tensor) -> Tensor:
    """Return the tensor that torch.func's transforms have wrapped: with all values, of whatever shape; or the tensor itself."""
    while _knows_levels and not torch.compiler.is_compiling() and _is_wrapped(tensor):
        tensor = _unwrap(tensor)
    return tensor


def one_by_one(context: Any) -> list[Callable[[], Any]]:
    """Return what makes each of the tensors that a context of autograd's has saved, or raises where one was written to.

    It is empty where torch hands them out together only.
    """
    saved = getattr(context, "_raw_saved_tensors", ())
    return [tensor.unpack for tensor in saved if hasattr(tensor, "unpack")]
