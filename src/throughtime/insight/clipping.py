"""What clipping does to gradients: how often, how strongly, to which lags, and how it bends them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from throughtime.cells import Parameters
from throughtime.errors import InputError


class ClipStatistics(NamedTuple):
    """What clipping by the global norm met over many steps of training.

    Attributes:
        median: Median norm before clipping, of the finite ones.
        largest: Largest norm before clipping, of the finite ones.
        share: Share of the steps that were clipped; those that are not finite count as clipped.
        scale: Mean factor of the steps that were clipped, of the finite ones; 1 where none was.
        not_finite: How many norms were infinite or no number.
    """

    median: float
    largest: float
    share: float
    scale: float
    not_finite: int


def clip_statistics(norms: Float[Tensor, "N"], max_norm: float) -> ClipStatistics:
    """Summarise clipping by the global norm, g ← g · min(1, c/‖g‖).

    Args:
        norms: ‖g‖ before clipping, of each step.
        max_norm: c.

    Source: Pascanu, Mikolov & Bengio (1211.5063), algorithm 1.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> insight.clip_statistics(torch.tensor([0.5, 2.0, 4.0, float("nan")]), max_norm=1.0)
        ClipStatistics(median=2.0, largest=4.0, share=0.75, scale=0.375, not_finite=1)
    """
    if len(norms) == 0 or max_norm <= 0:
        raise InputError(
            f"{len(norms)} norms and max_norm = {max_norm}; expected at least one norm and a bound above 0"
        )
    finite = norms[norms.isfinite()]
    clipped = finite[finite > max_norm]
    not_finite = len(norms) - len(finite)
    return ClipStatistics(
        finite.quantile(0.5).item() if len(finite) else float("nan"),
        finite.max().item() if len(finite) else float("nan"),
        (len(clipped) + not_finite) / len(norms),
        (max_norm / clipped).mean().item() if len(clipped) else 1.0,
        not_finite,
    )


def lag_shares(by_lag: Sequence[Parameters]) -> Float[Tensor, "K"]:
    """Return each lag's share of the gradient: ⟨g_k, g⟩/‖g‖², which add up to 1; below zero where a lag pulls against the rest.

    Args:
        by_lag: What `lag_gradients` returned, all lanes.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.RNN(5, 4), torch.randn(30, 2, 5))
        >>> shares = insight.lag_shares(insight.lag_gradients(recording, torch.ones(30, 2, 4)))
        >>> round(shares.sum().item(), 4)
        1.0
    """
    flat = torch.cat([w.flatten(1) for lane in by_lag for w in lane.to_list()], dim=1)
    total = flat.sum(0)
    return flat @ total / total.square().sum()


class ClippedLags(NamedTuple):
    """Which lags clipping by the global norm scales down, over several gradients.

    Attributes:
        share: Share of the gradients that are clipped.
        removed: Of what clipping takes away, Σ (1 − scale) ‖g‖, each lag's share (K,); NaN where nothing is clipped.
        kept: Of what it leaves, Σ scale · ‖g‖, each lag's share (K,).
    """

    share: float
    removed: Float[Tensor, "K"]
    kept: Float[Tensor, "K"]


def clipped_lags(gradients: Sequence[Sequence[Parameters]], max_norm: float) -> ClippedLags:
    """Tell which lags clipping scales down.

    Clipping scales a whole gradient, all its lags alike; but it scales the large gradients, and where those are large because
    of far lags, far lags are what it takes away.

    Args:
        gradients: What `lag_gradients` returned for each of several windows of training, the same number of lags each.
        max_norm: c.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.RNN(5, 4)
        >>> windows = [insight.record(layer, torch.randn(9, 2, 5)) for _ in range(4)]
        >>> gradients = [insight.lag_gradients(window, torch.ones(9, 2, 4)) for window in windows]
        >>> insight.clipped_lags(gradients, max_norm=1e-3).share
        1.0
    """
    if not gradients or max_norm <= 0:
        raise InputError(
            f"{len(gradients)} gradients and max_norm = {max_norm}; expected at least one and a bound above 0"
        )
    norms, shares = [], []
    for by_lag in gradients:
        flat = torch.cat([w.flatten(1) for lane in by_lag for w in lane.to_list()], dim=1)
        norms.append(flat.sum(0).norm())
        shares.append(lag_shares(by_lag))
    norm, share = torch.stack(norms), torch.stack(shares)
    scale = (max_norm / norm).clamp(max=1)
    removed, kept = (1 - scale) * norm, scale * norm
    return ClippedLags((scale < 1).double().mean().item(), removed @ share / removed.sum(), kept @ share / kept.sum())


def value_clip_cosine(gradient: Sequence[Tensor], max_value: float) -> float:
    """Return the cosine between a gradient and itself with each entry cut to [−c, c].

    Clipping by the norm keeps the direction, its cosine is 1; clipping by the value bends the gradient towards the corners.

    Args:
        gradient: The tensors of a gradient.
        max_value: c.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> round(insight.value_clip_cosine([torch.tensor([3.0, 0.1])], max_value=0.1), 3)
        0.73
    """
    if max_value <= 0:
        raise InputError(f"max_value = {max_value}: expected a bound above 0")
    flat = torch.cat([part.flatten() for part in gradient]).double()
    return torch.cosine_similarity(flat, flat.clamp(-max_value, max_value), dim=0).item()
