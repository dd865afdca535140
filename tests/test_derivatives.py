"""Derivatives of every kind, over all cells and options, against finite differences in float64.

ℓ(θ) is each row's loss, of all that can be differentiated by. Its derivative along a direction v is told by each kind of
differentiation in a way of its own: row by row, or summed over the rows.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transforms import LAYERS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

STEP = 1e-6  # of the differences
Tensors = dict[str, Tensor]


@dataclass
class Draw:
    """A layer and what it is called with.

    Attributes:
        layer: With parameters that aren't differentiated by.
        theta: What is: parameters, embedding, x, h and c, by name.
        others: ids, lengths, reset, and the weights of each result in the loss, w0 ….
        is_packed: Whether the layer is called with a PackedSequence.
        seed: Of what the layer draws.
    """

    layer: nn.Module
    theta: Tensors
    others: Tensors
    is_packed: bool
    seed: int

    def losses(self, theta: Tensors, others: Tensors) -> Tensor:
        """Return each row's loss (B,)."""
        torch.manual_seed(self.seed)
        axis = 0 if self.layer.batch_first else 1
        parameters = {name: value for name, value in theta.items() if name in dict(self.layer.named_parameters())}
        hx = tuple(theta[name] for name in "hc" if name in theta)
        options = {
            name: given[name]
            for given in (theta, others)
            for name in ("embedding", "lengths", "reset")
            if name in given
        }
        x = theta["x"] if "x" in theta else others["ids"]
        if self.is_packed:
            lengths = options.pop("lengths")
            places, *rest = pack_padded_sequence(self.places(), lengths, enforce_sorted=False)
            x = PackedSequence(x.transpose(0, 1 - axis).flatten(0, 1)[places], *rest)
        output, final = functional_call(
            self.layer, parameters, (x, (hx if len(hx) == 2 else hx[0]) if hx else None), options
        )
        if self.is_packed:
            output = output.data.new_zeros(self.places().numel(), output.data.shape[1]).index_copy(
                0, places, output.data
            )
            output = output.unflatten(0, self.places().shape).transpose(0, 1 - axis)
        results = [
            output.movedim(axis, 0),
            *(s.transpose(0, 1) for s in (final if isinstance(final, tuple) else (final,))),
        ]
        return sum((r * others[f"w{i}"]).flatten(1).sum(1) for i, r in enumerate(results))

    def places(self) -> Tensor:
        """Number the places (T, B): torch's own ways to pack and pad know few transforms."""
        rows, steps = self.others["w0"].shape[:2]
        return torch.arange(steps * rows).view(steps, rows)

    def row_loss(self, theta: Tensors, others: Tensors) -> Tensor:
        """Return the loss of one row, whose tensors have no axis for rows."""
        axes = self.axes()
        theta, others = (
            {name: t if axes[name] is None else t.unsqueeze(axes[name]) for name, t in given.items()}
            for given in (theta, others)
        )
        return self.losses(theta, others)[0]

    def axes(self) -> dict[str, int | None]:
        """Along which axis a tensor has its rows."""
        axis = 0 if self.layer.batch_first else 1
        of_rows = {"x": axis, "ids": axis, "reset": axis, "h": 1, "c": 1, "lengths": 0, "w0": 0, "w1": 0, "w2": 0}
        return {name: of_rows.get(name) for name in (*self.theta, *self.others)}


def draw(
    *,
    name,
    num_layers,
    bidirectional,
    batch_first,
    bias,
    steps,
    rows,
    read,
    ragged,
    resets,
    has_state,
    recomputes,
    trains,
    seed,
) -> Draw:
    torch.manual_seed(seed)
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    layer = LAYERS[name](3, 4, recompute_every=int(recomputes), **options).double().train(trains)
    shape, new = ((rows, steps) if batch_first else (steps, rows)), partial(torch.randn, dtype=torch.float64)
    theta, others = {name: p.detach() for name, p in layer.named_parameters()}, {}
    count, ways = num_layers * (1 + bidirectional), 1 + bidirectional
    widths = [layer.output_size, *[layer.hidden_size] * name.startswith("lstm")]
    if read in ("ids", "embedded"):
        others["ids"] = torch.randint(0, 3, shape)
    else:
        theta["x"] = new(*shape, 3)
    if read == "embedded":
        theta["embedding"] = new(4, 3)
    if has_state:
        theta |= {part: new(count, rows, width) for part, width in zip("hc", widths, strict=False)}
    if ragged or read == "packed":
        others["lengths"] = torch.randint(int(read == "packed"), steps + 1, (rows,))
    if resets and read != "packed":
        others["reset"] = torch.rand(shape) < 0.3
    others["w0"] = new(rows, steps, ways * layer.output_size)
    others |= {f"w{index}": new(rows, count, width) for index, width in enumerate(widths, 1)}
    return Draw(layer, theta, others, read == "packed", seed)


OPTIONS = {
    "name": st.sampled_from(list(LAYERS)),
    "num_layers": st.sampled_from([1, 1, 2]),
    "bidirectional": st.booleans(),
    "batch_first": st.booleans(),
    "bias": st.booleans(),
    "steps": st.integers(1, 4),
    "rows": st.integers(1, 3),
    "read": st.sampled_from(["vectors", "vectors", "ids", "embedded", "packed"]),
    "ragged": st.booleans(),
    "resets": st.booleans(),
    "has_state": st.booleans(),
    "recomputes": st.booleans(),
    "trains": st.booleans(),
    "seed": st.integers(0, 999),
}


def along(gradient: Tensors, direction: Tensors, mapped: int = 0) -> Tensor:
    """Return ⟨gradient, direction⟩, for each of what `mapped` axes in front stand for."""
    return sum((gradient[name] * v).flatten(mapped).sum(mapped) for name, v in direction.items())


def leaves_of(theta: Tensors) -> Tensors:
    return {name: value.clone().requires_grad_() for name, value in theta.items()}


def by_autograd(of: Draw, v: Tensors) -> Tensor:
    leaves = leaves_of(of.theta)
    found = torch.autograd.grad(
        of.losses(leaves, of.others).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return along(dict(zip(leaves, found, strict=True)), v)


def by_grad(of: Draw, v: Tensors) -> Tensor:
    return along(grad(lambda theta: of.losses(theta, of.others).sum())(of.theta), v)


def by_vjp(of: Draw, v: Tensors) -> Tensor:
    losses, pull = vjp(lambda theta: of.losses(theta, of.others), of.theta)
    return along(pull(torch.ones_like(losses))[0], v)


def by_jacrev(of: Draw, v: Tensors) -> Tensor:
    return along(jacrev(lambda theta: of.losses(theta, of.others))(of.theta), v, 1)


def by_batched_gradients(of: Draw, v: Tensors) -> Tensor:
    leaves = leaves_of(of.theta)
    losses = of.losses(leaves, of.others)
    options = {"is_grads_batched": True, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(losses, list(leaves.values()), torch.eye(len(losses)).double(), **options)
    return along(dict(zip(leaves, found, strict=True)), v, 1)


def by_mapped_gradients(of: Draw, v: Tensors) -> Tensor:
    leaves = leaves_of(of.theta)
    losses = of.losses(leaves, of.others)
    pull = lambda u: torch.autograd.grad(losses, list(leaves.values()), u, allow_unused=True, materialize_grads=True)  # noqa: E731
    return along(dict(zip(leaves, vmap(pull)(torch.eye(len(losses)).double()), strict=True)), v, 1)


def by_sample(of: Draw, v: Tensors) -> Tensor:
    """Gradients of each row's own loss; the losses themselves are checked as well."""
    of.layer.eval()  # whose masks would be drawn row by row
    axes = of.axes()
    own = {name: axes[name] for name in of.theta}
    gradients, losses = vmap(grad_and_value(of.row_loss), in_dims=(own, {name: axes[name] for name in of.others}))(
        of.theta, of.others
    )
    torch.testing.assert_close(losses, of.losses(of.theta, of.others), rtol=1e-9, atol=1e-11)
    v = {name: t if own[name] is None else t.movedim(own[name], 0) for name, t in v.items()}
    return sum((gradients[name] * t).flatten(1).sum(1) for name, t in v.items())


def by_copies(of: Draw, v: Tensors) -> Tensor:
    """In plain autograd, of a copy of each parameter for each row."""
    of.layer.eval()
    axes, rows = of.axes(), of.others["w0"].shape[0]
    copies = {name: t.expand(rows, *t.shape) if axes[name] is None else t for name, t in leaves_of(of.theta).items()}
    own, others = {name: axes[name] or 0 for name in copies}, {name: axes[name] for name in of.others}
    losses = vmap(of.row_loss, in_dims=(own, others))(copies, of.others)
    found = torch.autograd.grad(losses.sum(), list(copies.values()), allow_unused=True, materialize_grads=True)
    rows_first = {name: g.movedim(own[name], 0) for (name, g) in zip(copies, found, strict=True)}
    v = {name: t if axes[name] is None else t.movedim(axes[name], 0) for name, t in v.items()}
    return sum((rows_first[name] * t).flatten(1).sum(1) for name, t in v.items())


def by_forward_mode(of: Draw, v: Tensors) -> Tensor:
    return jvp(lambda theta: of.losses(theta, of.others), (of.theta,), (v,))[1]


def by_dual_tensors(of: Draw, v: Tensors) -> Tensor:
    with forward_ad.dual_level():
        losses = of.losses({name: forward_ad.make_dual(t, v[name]) for name, t in of.theta.items()}, of.others)
        value, tangent = forward_ad.unpack_dual(losses)
        return torch.zeros_like(value) if tangent is None else tangent


def check(by, **options) -> None:
    of = draw(**options)
    if by in (by_sample, by_copies):
        of = draw(**options | {"trains": False, "read": "vectors" if options["read"] == "packed" else options["read"]})
    v = {name: torch.randn_like(t) for name, t in of.theta.items()}
    found = by(of, v)
    after, before = ({name: t + sign * STEP * v[name] for name, t in of.theta.items()} for sign in (1, -1))
    expected = (of.losses(after, of.others) - of.losses(before, of.others)) / (2 * STEP)
    expected = expected if found.dim() else expected.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


IN_REVERSE = [by_autograd, by_grad, by_vjp]
FOR_MANY = [by_jacrev, by_batched_gradients, by_mapped_gradients, by_sample, by_copies]
FORWARD = [by_forward_mode, by_dual_tensors]


@pytest.mark.parametrize("by", IN_REVERSE)
@settings(max_examples=300)
@given(**OPTIONS)
def test_gradients(by, **options):
    check(by, **options)


@pytest.mark.parametrize("by", FOR_MANY)
@settings(max_examples=180)
@given(**OPTIONS)
def test_many_gradients(by, **options):
    check(by, **options)


@pytest.mark.parametrize("by", FORWARD)
@settings(max_examples=150)
@given(**OPTIONS)
def test_forward_mode(by, **options):
    check(by, **options)
