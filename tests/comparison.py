"""The one comparison that decides whether a fast result is right; tested itself, with wrong answers, in test_comparison.py."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
