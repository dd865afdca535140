"""The one comparison that decides whether a fast result is right; tested itself, with wrong answers, in test_comparison.py.

How much an honest computation errs depends on the order in which its library sums, which is another on another CPU, and, where
results are few numbers, on luck. So a test compares with the least accurate of several (`least_accurate`): the library's own,
the same with its sums term by term (`InOrder`), and the same of arguments that are moved as rounding moves them (`moved`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import throughtime

BACKENDS = list(throughtime.backends())  # those that work here
HAS_NATIVE = "native" in BACKENDS
OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def assert_as_accurate(
    actual: Sequence[Tensor],
    honest: Sequence[Tensor],
    exact: Sequence[Tensor],
    factor: float,
    names: Sequence[str] = (),
) -> None:
    """Assert that `actual` errs at most `factor` times what an honest computation in the same precision errs.

    Args:
        actual: The results on trial.
        honest: The same results from a trusted implementation in the same dtype.
        exact: The same results in float64.
        factor: 2 for outputs, 3 for gradients.
        names: What to call each result in the message.

    The honest error is floored at two units in the last place of the largest exact value: a reference that happens to
    err by nothing does not forbid rounding.
    """
    assert len(actual) == len(honest) == len(exact)
    names = names or [str(index) for index in range(len(actual))]
    for name, a, h, e in zip(names, actual, honest, exact, strict=True):
        if e.numel() == 0:
            assert a.shape == e.shape, f"{name}: shape {list(a.shape)}, expected {list(e.shape)}"
            continue
        error, allowed = _errors(name, a, h, e)
        allowed *= factor
        assert error <= allowed, f"{name}: errs by {error:.3g}, allowed {allowed:.3g} ({factor} × the honest error)"


def assert_as_accurate_on_average(
    draws: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]],
    factor: float,
    names: Sequence[str],
) -> None:
    """Assert it of the geometric mean over several draws of how many times the honest error `actual` errs.

    For results that are few numbers, or that amplify rounding: there one draw's largest error is chance, of either computation, and
    now and then several times the other's though their medians are equal. A ratio counts as 1 at least, so a lucky draw makes
    up for nothing, and one wrong answer among right ones is caught.

    Args:
        draws: (actual, honest, exact) of each, as `assert_as_accurate` takes them.
        factor: As there.
        names: What to call each result in the message.
    """
    for index, name in enumerate(names):
        ratios = []
        for actual, honest, exact in draws:
            error, allowed = _errors(name, actual[index], honest[index], exact[index])
            ratios.append(max(1.0, error / allowed))
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        assert mean <= factor, (
            f"{name}: errs by {mean:.3g} times the honest error, allowed are {factor}; draws: {ratios}"
        )


def least_accurate(exact: Sequence[Tensor], *computations: Sequence[Tensor]) -> list[Tensor]:
    """Return of each result the one, among those of several honest computations, that errs most."""
    return [
        max(results, key=lambda result: (result.double() - e).abs().max().item() if e.numel() else 0.0)
        for e, results in zip(exact, zip(*computations, strict=True), strict=True)
    ]


def moved(tensors: Sequence[Tensor], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Return the tensors with each number moved, at random, by up to what rounding to `dtype` moves it."""
    generator = torch.Generator().manual_seed(seed)
    shares = [2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1 for t in tensors]
    return [(t * (1 + torch.finfo(dtype).eps / 2 * s)).to(t.dtype) for t, s in zip(tensors, shares, strict=True)]


class InOrder(TorchDispatchMode):
    """Within this context float32 products and sums of plain torch code are taken term by term, as they are written."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        name, first = function.overloadpacket.__name__, arguments[0] if arguments else None
        if isinstance(first, Tensor) and first.dtype == torch.float32:
            if name == "mm":
                return _multiply_in_order(torch.zeros(()), *arguments)
            if name == "addmm":
                return _multiply_in_order(*arguments)
            if name == "sum" and len(arguments) > 1 and len(arguments[1]) == 1:
                return _sum_in_order(*arguments)
        return function(*arguments, **(options or {}))


def _multiply_in_order(start: Tensor, left: Tensor, right: Tensor) -> Tensor:
    total = start.expand(left.shape[0], right.shape[1])
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k]
    return total.clone()


def _sum_in_order(terms: Tensor, dims: Sequence[int], keep: bool = False) -> Tensor:
    total = torch.zeros_like(terms.select(dims[0], 0)) if terms.shape[dims[0]] else terms.sum(dims)
    for k in range(terms.shape[dims[0]]):
        total = total + terms.select(dims[0], k)
    return total.unsqueeze(dims[0]) if keep else total


def _errors(name: str, actual: Tensor, honest: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest error of a result on trial, and that of the honest one, floored."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == honest.dtype, f"{name}: dtype {actual.dtype}, expected {honest.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    floor = 2 * torch.finfo(actual.dtype).eps * max(exact.abs().max().item(), 1e-3)
    return (actual.double() - exact).abs().max().item(), max((honest.double() - exact).abs().max().item(), floor)


def gradients(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Return every gradient of a random linear combination of `function`'s results, zeros where one does not reach."""
    leaves = [a.detach().clone().requires_grad_() for a in arguments]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    grads = torch.autograd.grad(results, leaves, weights, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
