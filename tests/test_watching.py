"""Torch's private names: where a version of torch lacks one, everything is as right as with it."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import throughtime
from throughtime import watching

LEVELS = [
    *("get_interpreter_stack", "is_functorch_wrapped_tensor", "is_batchedtensor", "get_unwrapped", "maybe_get_bdim"),
]
NAMES = [
    ("torch._C", "_are_functorch_transforms_active"),
    ("torch._C", "_len_torch_dispatch_stack"),
    ("torch._C", "_len_torch_function_stack"),
    ("torch._C", "_get_tracing_state"),
    ("torch._C", "_AutoDispatchBelowAutograd"),
    ("torch._C._autograd", "_profiler_enabled"),
    ("torch._C._functorch", "is_legacy_batchedtensor"),
    *(("torch._C._functorch", name) for name in LEVELS),
    ("torch.autograd.forward_ad", "_current_level"),
]


@pytest.fixture(params=NAMES, ids=[name for _, name in NAMES])
def missing(request) -> Iterator[str]:
    """Read the names while one isn't there; torch itself has it back before anything is computed."""
    module, name = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(importlib.import_module(module), name)
        importlib.reload(watching)
    yield name
    importlib.reload(watching)


def computed() -> list[Tensor]:
    """What a layer computes, of every kind."""
    torch.manual_seed(3)
    layer = throughtime.GRU(3, 4, bidirectional=True).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    output, final = layer(x)
    once = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()], create_graph=True)
    twice = torch.autograd.grad(once[0].square().sum(), x)
    tangent = torch.func.jvp(lambda x: layer(x)[0], (x.detach(),), (torch.ones_like(x),))[1]
    many = torch.autograd.grad(layer(x)[0], x, torch.randn(3, *output.shape).double(), is_grads_batched=True)
    loss = lambda row: layer(row[:, None])[0].square().sum()  # noqa: E731
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=1)(x.detach())
    with torch.no_grad():
        return [output, final, *once, *twice, tangent, *many, by_sample, layer(x)[0]]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return computed()


def test_a_name_that_is_missing_changes_no_result(expected, missing):
    for a, e in zip(computed(), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_a_name_that_is_missing_means_watched(missing):
    known = watching.is_watched([]), watching.is_transformed(), watching.are_batched([torch.zeros(1)])
    if missing == "_AutoDispatchBelowAutograd":
        assert watching.below_autograd is None
    elif missing in LEVELS:
        assert torch.vmap(lambda _: torch.tensor(watching.transforms() == {"Other"}))(torch.zeros(1))
    else:
        assert any(known), missing


def test_otherwise_nobody_watches():
    assert not watching.is_watched([torch.zeros(1), None])
    assert not watching.is_transformed()
    assert not watching.are_batched([torch.zeros(1), None])
