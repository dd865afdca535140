"""Layers in bfloat16, and float32 layers under torch.autocast: the dtype table of docs/design.md, cell by cell."""

import copy

import pytest
import torch
from comparison import BACKENDS, GRADIENT_FACTOR, OUTPUT_FACTOR, assert_as_accurate
from test_layers import PAIRS, flat, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime
from throughtime.cells import CELLS

BF16 = torch.bfloat16
LAYERS = {
    **{name: lambda n=name, **k: pair(n, 33, **k)[0] for name in PAIRS},
    "gru_reset_before": lambda **k: throughtime.GRU(5, 33, reset_after=False, **k),
    "mgu": lambda **k: throughtime.MGU(5, 33, **k),
}
ANY_BACKEND = ["auto", *BACKENDS]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=BF16)


def train(module: nn.Module, x: Tensor, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and final state, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    results = flat(module(x, **options))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return results, list(torch.autograd.grad(results, [x, *module.parameters()], weights))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_a_bfloat16_layer_is_as_accurate_as_torchs(name, backend):
    layer, theirs, _ = pair(name, 33, backend=backend, num_layers=2, bidirectional=True)
    layer, theirs = layer.bfloat16(), theirs.bfloat16()
    x = torch.randn(7, 6, 5).bfloat16()
    exact, honest, actual = train(copy.deepcopy(theirs).double(), x.double()), train(theirs, x), train(layer, x)
    assert {t.dtype for t in (*actual[0], *actual[1])} == {BF16}
    assert_as_accurate(actual[0], honest[0], exact[0], OUTPUT_FACTOR)
    assert_as_accurate(actual[1], honest[1], exact[1], GRADIENT_FACTOR)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ANY_BACKEND)
@pytest.mark.parametrize("parameters", [torch.float32, BF16])
@pytest.mark.parametrize("given", [torch.float32, BF16])
def test_autocast_gives_every_cell_the_same_dtypes(name, backend, parameters, given):
    if name in ("gru_reset_before", "mgu") and backend == "torch":
        pytest.skip("torch has no such cell")
    layer = LAYERS[name](backend=backend).to(parameters)
    x = torch.randn(7, 6, 5).to(given)
    with autocast():
        results, grads = train(layer, x)
        output, final = layer(x, layer(x)[1])  # the state goes back in
        h = (results[1].to(parameters), results[2].to(parameters)) if len(results) == 3 else results[1].to(parameters)
        again, _ = layer(x, h)
    assert {t.dtype for t in results} == {BF16}
    assert [t.dtype for t in grads] == [given, *[parameters] * (len(grads) - 1)]
    assert output.dtype == again.dtype == BF16
    assert torch.equal(output, again)
    assert {t.dtype for t in (final if isinstance(final, tuple) else (final,))} == {BF16}


def test_autocast_gives_what_it_gives_torchs_lstm():
    layer, theirs, _ = pair("lstm", 33)
    x = torch.randn(7, 6, 5)
    exact = train(copy.deepcopy(theirs).double(), x.double())
    with autocast():
        honest, actual = train(theirs, x), train(layer, x)
    assert [t.dtype for t in actual[0]] == [t.dtype for t in honest[0]]
    assert [t.dtype for t in actual[1]] == [t.dtype for t in honest[1]]
    assert_as_accurate(actual[0], honest[0], exact[0], OUTPUT_FACTOR)
    for a, h, e in zip(actual[1], honest[1], exact[1], strict=True):
        assert_as_accurate([a], [h], [e], GRADIENT_FACTOR)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native kernels aren't built")
@pytest.mark.parametrize("name", LAYERS)
def test_float32_parameters_get_gradients_that_were_never_rounded(name):
    layer = LAYERS[name](backend="native")
    with autocast():
        _, grads = train(layer, torch.randn(7, 6, 5), lengths=torch.tensor([7, 0, 3, 7, 1, 5]))
    for grad in grads[1:]:
        assert (grad != grad.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_autocast_leaves_float64_alone(backend):
    layer = throughtime.LSTM(5, 4, backend=backend).double()
    x = torch.randn(3, 2, 5).double()
    expected = layer(x)[0]
    with autocast():
        assert torch.equal(layer(x)[0], expected)
        with pytest.raises(ValueError, match="does not match weight dtype"):
            layer(x.float())
        with pytest.raises(ValueError, match="does not match weight dtype"):
            throughtime.LSTM(5, 4, backend=backend)(x)


@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_autocast_of_packed_and_ragged_input(backend):
    layer = throughtime.GRU(5, 33, backend=backend)
    x, lengths = torch.randn(7, 3, 5), torch.tensor([2, 7, 4])
    with autocast():
        output, h = layer(x, lengths=lengths)
        packed, packed_h = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert output.dtype == packed.data.dtype == h.dtype == BF16
    torch.testing.assert_close(h, packed_h)
    assert (output[2:, 0] == 0).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("parameters", [torch.float32, BF16])
def test_the_operator_keeps_torchs_rules(name, backend, parameters):
    cell = CELLS[name]
    draw = lambda *shape: torch.randn(shape, requires_grad=True)  # noqa: E731
    weights = [draw(cell.spec.gates * 4, width) for width in (3, 4)] + [draw(cell.spec.gates * 4) for _ in range(2)]
    weights = [w.detach().to(parameters).requires_grad_() for w in weights]
    state = [draw(2, 4).detach().bfloat16().requires_grad_() for _ in range(len(cell.spec.states))]
    x = draw(5, 2, 3).detach().bfloat16().requires_grad_()
    torch.library.opcheck(
        torch.ops.throughtime.recurrence.default, (x, state, weights, None, None, [], name, False, True, backend)
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])  # which doesn't trace
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_under_autocast_without_a_graph_break(name, backend):
    layer = LAYERS[name](backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 6, 5)
    with autocast():
        expected, actual = train(layer, x), train(compiled, x)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_second_derivatives_have_their_dtypes(backend):
    layer = throughtime.LSTM(5, 33, backend=backend)
    x = torch.randn(7, 6, 5, requires_grad=True)
    with autocast():
        (slope,) = torch.autograd.grad(layer(x)[0].float().square().sum(), x, create_graph=True)
    grads = torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()])
    exact = copy.deepcopy(layer).double()
    z = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(exact(z)[0].square().sum(), z, create_graph=True)
    for a, e in zip(grads, torch.autograd.grad(slope.square().sum(), [z, *exact.parameters()]), strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() < 0.1 * e.norm()
