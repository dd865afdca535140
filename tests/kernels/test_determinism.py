"""The same inputs and the same number of threads give the same bits, every time; and memory doesn't grow with what was seen."""

import random

import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor

import throughtime
from throughtime.cells import CELLS
from throughtime.kernels import layout, native

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

LAYERS = {
    "rnn_tanh": throughtime.RNN,
    "rnn_relu": lambda *sizes: throughtime.RNN(*sizes, nonlinearity="relu"),
    "lstm": throughtime.LSTM,
    "gru": throughtime.GRU,
    "gru_reset_before": lambda *sizes: throughtime.GRU(*sizes, reset_after=False),
    "mgu": throughtime.MGU,
}


def train(layer: torch.nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Output, final state, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    output, final = layer(x, **options)
    results = [output, *(final if isinstance(final, tuple) else [final])]
    grads = torch.autograd.grad(results, [x, *layer.parameters()], [torch.ones_like(r) for r in results])
    return [*(r.detach() for r in results), *grads]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch", [1, 3, 19])  # hidden units shared by the threads; both; rows shared
def test_the_same_bits_every_time(cell, batch, threads, small_arrays_are_pooled):
    layer, x = LAYERS[cell](20, 130), torch.randn(9, batch, 20)
    layer.backend = "native"
    ragged = {"lengths": torch.randint(0, 10, (batch,)), "reset": torch.rand(9, batch) < 0.2}
    torch.set_num_threads(threads)
    try:
        for options in ({}, ragged):
            first = train(layer, x, **options)
            # in torch's memory, in the pool's, and where the last run has left its values
            for is_pooled in (False, True, True):
                small_arrays_are_pooled(is_pooled)
                assert all(map(torch.equal, train(layer, x, **options), first))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("columns", [1, 16, 20, 33, 48, 63])  # of the last panel: from one vector of them to four
def test_a_forward_pass_has_the_same_bits_however_it_is_cut(cell, columns, monkeypatch):
    layer, x = LAYERS[cell](columns, 64 + columns), torch.randn(9, 3, columns)
    layer.backend = "native"
    with torch.no_grad():
        whole = layer(x)[0]
    trained = train(layer, x)
    assert torch.equal(trained[0], whole)
    monkeypatch.setattr(layout, "_FORWARD_STRETCH", 1)
    monkeypatch.setattr(layout, "_FORWARD_ROWS", 6)  # two steps
    with torch.no_grad():
        assert torch.equal(layer(x)[0], whole)
    assert all(map(torch.equal, train(layer, x), trained))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_memory_does_not_grow_with_the_number_of_distinct_lengths(cell, small_arrays_are_pooled):
    layer = LAYERS[cell](8, 16)
    layer.backend = "native"
    run = lambda steps: train(layer, torch.randn(steps, 2, 8))  # noqa: E731
    native.release_memory()
    run(400)
    most = sum(native.memory_use())
    assert most > 0
    for steps in random.Random(1).sample(range(1, 400), 150):
        run(steps)
        assert sum(native.memory_use()) <= most
