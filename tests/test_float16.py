"""Layers in float16 on the CPU, and float32 layers under torch.autocast to it: computed in float32, rounded at their edges."""

import copy

import pytest
import torch
from comparison import GRADIENT_FACTOR, HAS_NATIVE, OUTPUT_FACTOR, assert_as_accurate
from test_bfloat16 import LAYERS, train
from test_layers import PAIRS, pair
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
F16 = torch.float16
VARIANTS = {
    "layer_norm": lambda **k: throughtime.LSTM(5, 33, layer_norm=True, **k),
    "zoneout": lambda **k: throughtime.GRU(5, 33, zoneout=0.3, **k),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_float16_layer_is_as_accurate_as_torchs(name):
    layer, theirs, _ = pair(name, 33, num_layers=2, bidirectional=True)
    layer, theirs = layer.half(), theirs.half()
    x = torch.randn(7, 6, 5).half()
    exact, honest, actual = train(copy.deepcopy(theirs).double(), x.double()), train(theirs, x), train(layer, x)
    assert {t.dtype for t in (*actual[0], *actual[1])} == {F16}
    assert_as_accurate(actual[0], honest[0], exact[0], OUTPUT_FACTOR)
    assert_as_accurate(actual[1], honest[1], exact[1], GRADIENT_FACTOR)


@pytest.mark.parametrize("name", [*LAYERS, *VARIANTS])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed", "unbatched", "ids", "embedded"])
def test_it_is_the_float32_layer_rounded_at_its_edges(name, form):
    """To the bit, in every form of input, gradients included."""
    layer = (LAYERS | VARIANTS)[name](num_layers=2, bidirectional=True).half()
    wide = copy.deepcopy(layer).float()
    x = torch.randn(7, 6, 5).half()
    options = {}
    if form == "lengths":
        options = {"lengths": [7, 0, 3, 3, 1, 6], "reset": torch.rand(7, 6) < 0.3}
    elif form == "unbatched":
        x = x[:, 0]
    elif form in ("ids", "embedded"):
        table = torch.randn(5, 5).half().requires_grad_()
        options = {"embedding": table} if form == "embedded" else {}
    results = []
    for module in (layer, wide):
        torch.manual_seed(1)
        dtype = next(module.parameters()).dtype
        given = x.to(dtype).requires_grad_()
        leaves = [given, *module.parameters()]
        if form in ("ids", "embedded"):
            given = torch.arange(42).view(7, 6) % 5
            leaves = leaves[1:]
        if form == "embedded":
            options["embedding"] = table.detach().to(dtype).requires_grad_()
            leaves.append(options["embedding"])
        read = pack_padded_sequence(given, torch.tensor([7, 6, 3, 3, 2, 1])) if form == "packed" else given
        output, final = module(read, **options)
        output = output.data if form == "packed" else output
        final = final if isinstance(final, tuple) else (final,)
        assert {t.dtype for t in (output, *final)} == {dtype}
        grads = torch.autograd.grad([output, *final], leaves, [torch.ones_like(t) for t in (output, *final)])
        results.append([output, *final, *grads])
    for narrow, exact in zip(*results, strict=True):
        assert narrow.dtype == F16
        assert torch.equal(narrow, exact.half())


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_to_float16(name):
    layer, x = LAYERS[name](), torch.randn(7, 6, 5)
    with torch.autocast("cpu", dtype=F16):
        results, grads = train(layer, x)
        output, final = layer(x, layer(x)[1])  # the state goes back in
    assert {t.dtype for t in results} == {F16}
    assert {t.dtype for t in (output, *(final if isinstance(final, tuple) else (final,)))} == {F16}
    assert {t.dtype for t in grads} == {torch.float32}
    exact, _ = train(copy.deepcopy(layer).double(), x.double())
    for narrow, wide in zip(results, exact, strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=2e-3, atol=2e-3)


def test_it_compiles():
    layer, x = throughtime.GRU(5, 8).half(), torch.randn(7, 3, 5).half()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x)[0], layer(x)[0])


def test_a_backend_that_is_insisted_on_computes_as_it_does():
    layer, x = throughtime.GRU(5, 8, backend="torch").half(), torch.randn(7, 3, 5).half()
    theirs = torch.nn.GRU(5, 8).half()
    theirs.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], theirs(x)[0])


@pytest.mark.parametrize("name", [*LAYERS, *VARIANTS])
@pytest.mark.parametrize("form", ["vectors", "ids", "embedded"])
def test_autocast_to_bfloat16_is_that_of_the_same_numbers_in_float32(name, form):
    layer = (LAYERS | VARIANTS)[name](num_layers=2, bidirectional=True).half()
    wide = copy.deepcopy(layer).float()
    table = torch.randn(7, 5).half()
    results = []
    for module in (layer, wide):
        torch.manual_seed(1)
        options = {"embedding": table.to(next(module.parameters()).dtype)} if form == "embedded" else {}
        x = torch.arange(42).view(7, 6) % 5 if form != "vectors" else torch.linspace(-1, 1, 210).view(7, 6, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = module(x, **options)
        results.append([output, *torch.autograd.grad(output.float().sum(), list(module.parameters()))])
    assert results[0][0].dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    for narrow, exact in zip(results[0][1:], results[1][1:], strict=True):
        assert narrow.dtype == F16
        assert torch.equal(narrow, exact.half())
