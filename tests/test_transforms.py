"""torch.func's transforms, forward mode and batched gradients: right for every cell and option, or an error; never a silent zero.

J v, by forward mode through the equations, and Jᵀ u, by the backward pass of whatever computes a plain call, must agree:
⟨u, J v⟩ = ⟨Jᵀ u, v⟩.
"""

import subprocess
import sys

import pytest
import torch
from comparison import BACKENDS, HAS_NATIVE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

import throughtime
from throughtime import transforms
from throughtime.backend import native, reference
from throughtime.kernels import layout

LAYERS = {
    "rnn": throughtime.RNN,
    "rnn_relu": lambda *a, **k: throughtime.RNN(*a, nonlinearity="relu", **k),
    "lstm": throughtime.LSTM,
    "lstm_projected": lambda *a, **k: throughtime.LSTM(*a, proj_size=2, **k),
    "lstm_variant": lambda *a, **k: throughtime.LSTM(*a, peepholes=True, coupled=True, layer_norm=True, **k),
    "gru": throughtime.GRU,
    "gru_reset_before": lambda *a, **k: throughtime.GRU(*a, reset_after=False, **k),
    "mgu": throughtime.MGU,
    "gru_variant": lambda *a, **k: throughtime.GRU(*a, layer_norm=True, zoneout=0.3, recurrent_dropout=0.3, **k),
}


def make(name: str, **options) -> nn.Module:
    """Return a layer that draws no masks: transforms let nobody draw, unless they are told to."""
    return LAYERS[name](3, 4, **options).double().eval()


def by_parameters(layer: nn.Module, **options):
    """Return the layer's output as a function of input and parameters, drawing the same masks in each call."""
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(5)
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), options)[0]

    return run, tuple(p.detach() for p in layer.parameters())


def inner(left, right) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


@given(
    name=st.sampled_from(list(LAYERS)),
    num_layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    steps=st.integers(1, 5),
    batch=st.integers(1, 3),
    ragged=st.booleans(),
    resets=st.booleans(),
    is_frozen=st.booleans(),
    by=st.sampled_from(["jvp", "dual", "vjp"]),
    seed=st.integers(0, 99),
)
def test_forward_mode_agrees_with_the_backward_pass(
    *, name, num_layers, bidirectional, batch_first, bias, steps, batch, ragged, resets, is_frozen, by, seed
):
    torch.manual_seed(seed)
    layer = make(name, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    layer.requires_grad_(not is_frozen).train(by != "vjp")
    shape = (batch, steps) if batch_first else (steps, batch)
    options = {"lengths": torch.randint(0, steps + 1, (batch,))} if ragged else {}
    options |= {"reset": torch.rand(shape) < 0.3} if resets else {}
    run, parameters = by_parameters(layer, **options)
    given = torch.randn(*shape, 3, dtype=torch.float64), *parameters
    directions = tuple(map(torch.randn_like, given))
    leaves = [t.clone().requires_grad_() for t in given]
    output = run(*leaves)
    u = torch.randn_like(output)
    backward = torch.autograd.grad(output, leaves, u, allow_unused=True)
    backward = [torch.zeros_like(t) if g is None else g for g, t in zip(backward, leaves, strict=True)]
    expected = inner(backward, directions)
    if by == "jvp":
        value, tangent = jvp(run, given, directions)
    elif by == "dual":
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(run(*map(forward_ad.make_dual, given, directions)))
            tangent = torch.zeros_like(value) if tangent is None else tangent
    else:
        value, pull = vjp(run, *given)
        torch.testing.assert_close(list(pull(u)), backward, rtol=1e-10, atol=1e-11)
        tangent = None
    torch.testing.assert_close(value, output, rtol=1e-11, atol=1e-12)
    if tangent is not None:
        assert inner([tangent], [u]) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_jacobians_and_hessians_of_every_kind(name):
    layer, x = make(name), torch.randn(4, 2, 3, dtype=torch.float64)
    run, parameters = by_parameters(layer)
    expected = torch.autograd.functional.jacobian(lambda x: run(x, *parameters), x)
    for jacobian in (jacfwd, jacrev):
        torch.testing.assert_close(jacobian(run)(x, *parameters), expected, rtol=1e-9, atol=1e-11)
    loss = lambda x: run(x, *parameters).square().sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients_and_ensembles(name):
    layer, x = make(name), torch.randn(4, 3, 3, dtype=torch.float64)
    run, parameters = by_parameters(layer)
    loss = lambda parameters, row: run(row[:, None], *parameters).square().sum()  # noqa: E731
    together = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for row in range(3):
        for each, alone in zip(together, grad(loss)(parameters, x[:, row]), strict=True):
            torch.testing.assert_close(each[row], alone, rtol=1e-10, atol=1e-12)
    both = vmap(loss, in_dims=(0, None))(tuple(torch.stack([p, 2 * p]) for p in parameters), x[:, 0])
    torch.testing.assert_close(both[1], loss(tuple(2 * p for p in parameters), x[:, 0]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_many_gradients_at_once(name, bidirectional):
    layer, x = make(name, bidirectional=bidirectional), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    output = layer(x)[0]
    leaves, many = [x, *layer.parameters()], torch.randn(3, *output.shape, dtype=torch.float64)
    at_once = torch.autograd.grad(output, leaves, many, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda g: torch.autograd.grad(output, leaves, g, retain_graph=True))(many)
    for number in range(3):
        for a, m, e in zip(
            at_once, mapped, torch.autograd.grad(output, leaves, many[number], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a[number], e, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(m[number], e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_in_every_mode(name):
    run, parameters = by_parameters(make(name))
    given = [t.clone().requires_grad_() for t in (torch.randn(2, 2, 3, dtype=torch.float64), *parameters)]
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(run, given, **modes)
    assert torch.autograd.gradgradcheck(lambda x: run(x, *given[1:]), given[:1], check_batched_grad=True)


def test_token_ids_and_an_embedding():
    layer, ids = make("gru"), torch.randint(0, 3, (4, 2))
    one_hot, parameters = by_parameters(layer)
    directions = tuple(map(torch.randn_like, parameters))
    vectors = nn.functional.one_hot(ids, 3).double()
    tangents = [jvp(lambda *p, x=x: one_hot(x, *p), parameters, directions)[1] for x in (ids, vectors)]
    torch.testing.assert_close(*tangents)
    embedding = torch.randn(7, 3, dtype=torch.float64)
    by_table = lambda e: layer(ids, embedding=e)[0]  # noqa: E731
    looked_up = lambda e: layer(e[ids])[0]  # noqa: E731
    for one, other in zip(
        jvp(by_table, (embedding,), (embedding,)), jvp(looked_up, (embedding,), (embedding,)), strict=True
    ):
        torch.testing.assert_close(one, other)
    two = vmap(lambda i: layer(i)[0])(torch.stack([ids, ids.flip(0)]))
    torch.testing.assert_close(two[1], layer(ids.flip(0))[0])


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_operator_itself_never_answers_zero(bidirectional):
    layer, x = make("gru", bidirectional=bidirectional), torch.randn(4, 2, 3, dtype=torch.float64)
    parameters = [p.detach() for p in layer.parameters()]
    state = [torch.zeros(2, 4, dtype=torch.float64)] * (1 + bidirectional)

    def run(x: Tensor) -> Tensor:
        given = (x, state, parameters, None, None, [], "gru", False, False, "native", None, 0, bidirectional)
        return torch.ops.throughtime.recurrence.default(*given)[0]

    expected = jvp(lambda x: layer(x)[0], (x,), (x,))[1]
    torch.testing.assert_close(jvp(run, (x,), (x,))[1], expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, expected)


needs_kernels = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")


@needs_kernels
@pytest.mark.parametrize("what", ["forward-mode", "parameters", "packed rows"])
def test_a_backend_that_has_no_rule_says_so(what):
    layer, x = make("gru", backend="native"), torch.randn(4, 2, 3, dtype=torch.float64)
    run, parameters = by_parameters(layer)
    packed = pack_sequence([x[:, 0], x[:3, 1]])
    transformed = {
        "forward-mode": lambda: jvp(lambda x: layer(x)[0], (x,), (x,)),
        "parameters": lambda: vmap(run, in_dims=(None, *[0] * len(parameters)))(
            x, *(torch.stack([p, 2 * p]) for p in parameters)
        ),
        "packed rows": lambda: vmap(lambda data: layer(packed._replace(data=data))[0].data)(packed.data[None]),
    }
    with pytest.raises(
        NotImplementedError, match=rf"'native' can't serve this request: they have no rule for .*{what}"
    ):
        transformed[what]()


def loss_of(layer: nn.Module):
    names = [name for name, _ in layer.named_parameters()]

    def loss(parameters: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0].square().sum()

    return loss, tuple(p.detach() for p in layer.parameters())


def per_sample(loss):
    return lambda parameters, x: vmap(grad(loss), in_dims=(None, 1))(parameters, x[:, :, None])


def cubes(gradients) -> Tensor:
    """Of each sample's gradients, so that their derivative isn't that of a sum over samples."""
    return sum((g.flatten(1).norm(dim=1) ** 3).sum() for g in gradients)


def in_plain_autograd(function, parameters: tuple[Tensor, ...], **options):
    """Return the gradients of what a function of the parameters returns, in plain autograd."""
    leaves = [p.clone().requires_grad_() for p in parameters]
    return torch.autograd.grad(function(tuple(leaves)), leaves, **options)


NESTS = {
    "jacrev of jacrev": lambda loss, p, x: jacrev(jacrev(loss, argnums=1), argnums=(0, 1))(p, x),
    "jacrev of grad": lambda loss, p, x: jacrev(grad(loss))(p, x),
    "jacfwd of grad": lambda loss, p, x: jacfwd(grad(loss))(p, x),
    "hessian": lambda loss, p, x: hessian(loss, argnums=1)(p, x),
    "grad of per-sample gradients": lambda loss, p, x: grad(lambda p, x: cubes(per_sample(loss)(p, x)), (0, 1))(p, x),
    "autograd of per-sample gradients": lambda loss, p, x: in_plain_autograd(
        lambda p: cubes(per_sample(loss)(p, x)), p
    ),
    "vmap of hessian": lambda loss, p, x: vmap(hessian(loss, argnums=1), in_dims=(None, 1))(p, x[:, :, None]),
    "vmap of jacrev": lambda loss, p, x: vmap(jacrev(loss, (0, 1)), in_dims=(None, 1))(p, x[:, :, None]),
    "vmap of vmap of grad": lambda loss, p, x: vmap(
        lambda factor: vmap(grad(loss, (0, 1)), in_dims=(None, 1))(p, factor * x[:, :, None])
    )(torch.tensor([1.0, 2.0])),
    "grad of vmap": lambda loss, p, x: grad(lambda p: vmap(lambda row: loss(p, row), in_dims=1)(x[:, :, None]).norm())(
        p
    ),
    "autograd of vmap": lambda loss, p, x: in_plain_autograd(
        lambda p: vmap(lambda row: loss(p, row), in_dims=1)(x[:, :, None]).norm(), p
    ),
    "batched gradients of vmap": lambda loss, p, x: in_plain_autograd(
        lambda p: vmap(lambda row: loss(p, row), in_dims=1)(x[:, :, None]),
        p,
        grad_outputs=torch.eye(x.shape[1], dtype=x.dtype),
        is_grads_batched=True,
    ),
    "jvp of vjp": lambda loss, p, x: jvp(vjp(lambda p: loss(p, x), p)[1], *[(torch.tensor(2.0).double(),)] * 2),
    "grad of jvp": lambda loss, p, x: grad(lambda x: jvp(lambda x: loss(p, x), (x,), (x.detach(),))[1])(x),
    "ensemble of per-sample gradients": lambda loss, p, x: vmap(per_sample(loss), in_dims=(0, None))(
        tuple(torch.stack([t, 2 * t]) for t in p), x
    ),
}


@needs_kernels
@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("name", ["rnn", "lstm", "lstm_projected", "lstm_variant", "gru", "gru_reset_before", "mgu"])
def test_nests_are_those_of_the_equations(nest, name):
    layer, x = make(name), torch.randn(3, 2, 3, dtype=torch.float64)
    equations = make(name, backend="reference")
    equations.load_state_dict(layer.state_dict())
    found, expected = (NESTS[nest](*loss_of(one), x) for one in (layer, equations))
    for a, e in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The passes of kernels and equations, in order."""
    seen = []

    def noted(module, name: str, what: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (seen.append(what), function(*given))[1])

    noted(native, "forward", "kernels forward")
    noted(native, "backward", "kernels backward")
    for name in ("forward_openly", "backward_openly", "backward_to_gates_openly"):
        noted(reference, name, "equations")
    return seen


@needs_kernels
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "gru_reset_before", "mgu"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_per_sample_gradients_are_one_pass_over_the_batch(name, bidirectional, passes):
    loss, parameters = loss_of(make(name, bidirectional=bidirectional))
    per_sample(loss)(parameters, torch.randn(4, 3, 3, dtype=torch.float64))
    assert passes == ["kernels forward", "kernels backward"]


@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_and_mapped_inputs_are_computed_by_the_kernels(name, passes):
    (loss, parameters), x = loss_of(make(name)), torch.randn(4, 3, 3, dtype=torch.float64)
    grad(loss)(parameters, x)
    assert passes == ["kernels forward", "kernels backward"]
    passes.clear()
    vmap(loss, in_dims=(None, 1))(parameters, x[:, :, None])
    vmap(grad(loss, argnums=1), in_dims=(None, 1))(parameters, x[:, :, None])
    jacrev(loss, argnums=1)(parameters, x)
    assert passes == ["kernels forward", *["kernels forward", "kernels backward"] * 2]


@needs_kernels
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "gru_reset_before", "mgu"])
def test_copies_of_the_parameters_get_gradients_of_their_own_in_one_pass(name, passes):
    (loss, parameters), x = loss_of(make(name)), torch.randn(4, 3, 3, dtype=torch.float64)
    leaves = [p.clone().requires_grad_() for p in parameters]
    copies = tuple(leaf.expand(3, *leaf.shape) for leaf in leaves)
    losses = vmap(loss, in_dims=(0, 1))(copies, x[:, :, None])
    gradients = torch.autograd.grad(losses.sum(), copies, retain_graph=True)
    assert passes == ["kernels forward", "kernels backward"]
    for a, e in zip(gradients, per_sample(loss)(parameters, x), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    again = torch.autograd.grad(losses.sum(), copies, create_graph=True)
    second = torch.autograd.grad(cubes(again), leaves)
    expected = in_plain_autograd(lambda p: cubes(per_sample(loss)(p, x)), parameters)
    for a, e in zip(second, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@needs_kernels
@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("mapped", ["in pieces", "over many stretches"])
def test_the_memory_of_a_pass_changes_no_result(name, mapped, monkeypatch):
    (loss, parameters), x = loss_of(make(name, bidirectional=True)), torch.randn(5, 3, 3, dtype=torch.float64)
    outputs = lambda x: per_sample(loss)(parameters, x)  # noqa: E731
    computed = lambda: [*outputs(x), *jacrev(lambda x: torch.stack([g.sum() for g in outputs(x)]))(x)]  # noqa: E731
    expected = computed()
    if mapped == "in pieces":
        monkeypatch.setattr(transforms, "_COPIES", 1)
    else:
        monkeypatch.setattr(layout, "_STRETCH", 100)
    for a, e in zip(computed(), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_what_is_mapped_is_checked(backend):
    layer, ids = throughtime.GRU(3, 4, backend=backend), torch.randint(0, 3, (2, 5, 2))
    x, lengths = torch.randn(5, 2, 3), torch.tensor([[5, 3], [6, 0]])
    with pytest.raises(ValueError, match=r"lengths\[1, 0\] = 6 exceeds T = 5"):
        vmap(lambda n: layer(x, lengths=n)[0])(lengths)
    ids[1, 4, 0] = 7
    with pytest.raises((IndexError, RuntimeError), match=r"token id 7|[Cc]lass values"):
        vmap(lambda i: layer(i)[0])(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "gru_reset_before", "mgu"])
def test_gradients_by_sample_in_every_dtype(name, dtype):
    layer, x = make(name).to(dtype), torch.randn(4, 3, 3, dtype=torch.float64).to(dtype)
    found = per_sample(loss_of(layer)[0])(loss_of(layer)[1], x)
    exact = per_sample(loss_of(layer.double())[0])(loss_of(layer.double())[1], x.double())
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == dtype
        assert float((f - e).abs().max() / e.abs().max()) < 8 * torch.finfo(dtype).eps


def test_gradients_under_autocast_have_their_parameters_dtype():
    loss, parameters = loss_of(throughtime.GRU(3, 4))
    x = torch.randn(4, 3, 3)
    exact = per_sample(loss)(parameters, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = per_sample(loss)(parameters, x)
    for r, e in zip(rounded, exact, strict=True):
        assert r.dtype == torch.float32
        torch.testing.assert_close(r, e, rtol=0.05, atol=0.05)


@needs_kernels
def test_a_traced_transform_holds_the_operator():
    (loss, parameters), x = loss_of(throughtime.GRU(3, 4)), torch.randn(4, 3, 3)
    graph = make_fx(per_sample(loss))(parameters, x)
    for name in ("recurrence", "recurrence_backward"):
        assert f"throughtime.{name}.default" in graph.code
    other = torch.randn(4, 3, 3)
    for a, e in zip(graph(parameters, other), per_sample(loss)(parameters, other), strict=True):
        torch.testing.assert_close(a, e)


def test_a_transform_can_be_compiled():
    """In a process of its own, since the equations' shape checks, which tests are run with, can't be traced."""
    script = """
import torch, throughtime
layer, x = throughtime.GRU(3, 4), torch.randn(4, 2, 3)
tangent = lambda x: torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))[1]
mapped = lambda x: torch.vmap(torch.func.grad(lambda row: layer(row[:, None])[0].sum()), in_dims=1)(x)
for transformed in (tangent, mapped):
    found = torch.compile(transformed, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, transformed(x))
    assert found.any()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch.func.linearize's own
@pytest.mark.parametrize("option", ["mask", "reset", "reset_to"])
def test_a_trace_decides_nothing_by_values(option):
    layer, x, hx = (
        throughtime.GRU(3, 4, bidirectional=True).double(),
        torch.randn(5, 2, 3).double(),
        torch.ones(2, 2, 4),
    )
    hx, fresh = hx.double(), {"reset_to": torch.randn(2, 1, 4).double()} if option == "reset_to" else {}
    name = "mask" if option == "mask" else "reset"
    some, others = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0], [0, 0]]) > 0, torch.tensor([[0, 1]] * 4 + [[1, 0]]) > 0

    def run(x: Tensor, marks: Tensor) -> Tensor:
        return layer(x, hx, **{name: marks}, **fresh)[0]

    graph = make_fx(run)(x, torch.zeros_like(some))
    for marks in (some, others):
        torch.testing.assert_close(graph(x, marks), run(x, marks))
        output, tangent = torch.func.linearize(lambda x: run(x, marks), x)  # noqa: B023 called before the next
        torch.testing.assert_close(output, run(x, marks))
        torch.testing.assert_close(tangent(x), jvp(lambda x: run(x, marks), (x,), (x,))[1])  # noqa: B023
