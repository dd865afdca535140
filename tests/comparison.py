"""The one comparison that decides whether a fast result is right; tested itself, with wrong answers, in test_comparison.py."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import throughtime
from throughtime.kernels import cpu

HAS_NATIVE = cpu.refusal("lstm", torch.zeros(1)) is None
BACKENDS = [name for name in throughtime.backends() if name != "native" or HAS_NATIVE]  # those that work here
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
        assert a.shape == e.shape, f"{name}: shape {list(a.shape)}, expected {list(e.shape)}"
        assert a.dtype == h.dtype, f"{name}: dtype {a.dtype}, expected {h.dtype}"
        if e.numel() == 0:
            continue
        assert torch.isfinite(a).all(), f"{name}: not finite"
        scale = e.abs().max().item()
        allowed = factor * max((h.double() - e).abs().max().item(), 2 * torch.finfo(a.dtype).eps * max(scale, 1e-3))
        error = (a.double() - e).abs().max().item()
        assert error <= allowed, f"{name}: errs by {error:.3g}, allowed {allowed:.3g} ({factor} × the honest error)"


def gradients(function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Return every gradient of a random linear combination of `function`'s results, zeros where one does not reach."""
    leaves = [a.detach().clone().requires_grad_() for a in arguments]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    grads = torch.autograd.grad(results, leaves, weights, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
