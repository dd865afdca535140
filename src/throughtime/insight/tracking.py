"""Gradients watched while a model is trained: how far they reach, a few numbers at a time."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from throughtime.insight.adjoint import norm, total_adjoint
from throughtime.insight.gradient_flow import lag_matrix, tail_decay
from throughtime.insight.recording import Recording, record_model
from throughtime.insight.verdict import VANISHED

ROWS = 2  # sequences that are looked at: what it costs is proportional to them


class GradientFlow(NamedTuple):
    """What a window of training says about its gradients, in the top layer.

    Attributes:
        horizon: Least lag at which less than 1/1000 of a loss's gradient is left; T where it lies beyond the window.
        decay: β, the tail's factor per step: below 1 gradients vanish, above it they explode. `None` where it can't be told.
        cancellation: Median of κ_t: 1 where all losses pull the state the same way.
    """

    horizon: float
    decay: float | None
    cancellation: float | None


def track_gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor, state: Any = None, lengths: Tensor | None = None
) -> GradientFlow:
    """Measure how far the gradients of a window of training reach back in it.

    Every loss of the window is followed to the window's beginning, in the first `ROWS` of its rows. Nothing is changed, neither the
    model nor a gradient nor the random numbers to come, so training goes on as it would have.

    Args:
        model: A language model with one recurrent layer or a stack of them,
            `model(ids (T, B), state[, lengths]) -> (logits (T, B, V), state)`.
        inputs: (T, B).
        targets: (T, B); −100 doesn't count.
        state: What the window starts from, tensors (L, B, H), or `None`.
        lengths: Steps in each row (B,), or `None`.

    Returns:
        Three numbers; cost: about that of two passes of plain torch over `ROWS` rows.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> from throughtime.lm import LanguageModel, ModelConfig
        >>> model, ids = LanguageModel(ModelConfig(vocabulary_size=9, hidden_size=16)), torch.randint(9, (31, 4))
        >>> flow = insight.track_gradients(model, ids[:-1], ids[1:])
        >>> 1 < flow.horizon <= 30, 0 < flow.cancellation <= 1
        (True, True)
    """
    rows = min(ROWS, inputs.shape[1])
    given = [inputs[:, :rows], None if state is None else tuple(part[:, :rows].contiguous() for part in state)]
    if lengths is not None:
        given.append(lengths[:rows])
    wanted = targets[:, :rows].flatten()

    def losses(result: Any) -> Tensor:
        return cross_entropy(result[0].flatten(0, 1), wanted, reduction="sum")

    recorded = record_model(model, tuple(given), losses)
    recording = Recording(recorded.recording.layers[-1][:1], recorded.recording.outputs)
    (lag,) = lag_matrix(recording, recorded.grad_outputs)
    curve = lag.curve[~lag.curve.isnan()]
    gone = (curve < VANISHED * curve[0]).nonzero()
    decay = tail_decay(curve)
    return GradientFlow(
        float(gone[0]) if len(gone) else float(len(inputs)),
        None if math.isnan(decay) else decay,
        _agreement(recording, recorded.grad_outputs, lag.norms),
    )


def _agreement(recording: Recording, grad_outputs: Tensor, norms: Tensor) -> float | None:
    """Return the median of κ_t, from the norms (S, K, B) by loss and lag; as `cancellation`, without another sweep."""
    (total,) = total_adjoint(recording, grad_outputs)
    steps = len(norms)
    step_of = (torch.arange(steps)[:, None] - torch.arange(norms.shape[1])).clamp(
        min=0
    )  # t = s − k; what lies before is zero
    sums = norms.new_zeros(steps).index_add_(0, step_of.flatten(), norms.sum(2).flatten())
    kappa = (norm(*total).sum(1) / sums).nanquantile(0.5).item()
    return None if math.isnan(kappa) else kappa
