"""What the gates do: how open they stand, how long they let the state last, and which way the gradient goes through them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from throughtime.errors import InputError
from throughtime.insight.adjoint import Rows, Span, Step, Watch, carry, norm
from throughtime.insight.gradient_flow import probe_losses
from throughtime.insight.recording import Lane, Recording
from throughtime.insight.threads import step_threads
from throughtime.shapes import Outputs, StepState
from throughtime.training.denormals import flush_denormals

GATES = {"i": "input", "f": "forget", "o": "output", "r": "reset", "z": "update"}
KEEPING = {"lstm": "f", "gru": "z", "gru_reset_before": "z"}  # what multiplies c, or h


class GateUse(NamedTuple):
    """How open a gate stands over a batch of sequences.

    Attributes:
        name: "input", "forget", "output" of an LSTM; "reset", "update" of a GRU, whose update gate keeps h.
        mean: Mean opening.
        closed: Share of its values below 0.1.
        open: Share of its values above 0.9.
    """

    name: str
    mean: float
    closed: float
    open: float


@step_threads()
def gate_use(lane: Lane) -> list[GateUse]:
    """Measure how open each gate stands: its mean, and the shares below 0.1 and above 0.9.

    A gate that saturates passes no gradient to its own weights; that is how memory is kept and how learning stalls.

    Args:
        lane: A layer and direction; a simple RNN has no gates and gives an empty list. Padding doesn't count.

    Source: Karpathy, Johnson & Li (1506.02078), section 4.2.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.init.forget_bias_(throughtime.LSTM(5, 8), 5.0)
        >>> (lane,) = insight.record(layer, torch.randn(20, 3, 5)).lanes
        >>> [(gate.name, gate.open) for gate in insight.gate_use(lane)]
        [('input', 0.0), ('forget', 1.0), ('output', 0.0)]
    """
    used = []
    for field, name in GATES.items():
        if field in lane.saved_fields and lane.cell.spec.gates > 1:
            values = lane.saved_fields[field]
            values = values.flatten() if lane.active is None else values[lane.active].flatten()
            shares = values.mean(), (values < 0.1).float().mean(), (values > 0.9).float().mean()
            used.append(GateUse(name, *(share.item() for share in shares)))
    return used


@step_threads()
def time_constants(lane: Lane) -> Float[Tensor, "H"]:
    """Return each unit's memory time constant τ = 1/(1 − f̄) in steps, from the mean of the gate that keeps its state.

    That is the forget gate of an LSTM and the update gate of a GRU: a state that is multiplied by f each step falls to 1/e
    in about τ steps.

    Args:
        lane: A layer and direction of a gated cell. Padding doesn't count.

    Raises:
        InputError: The cell has no such gate.

    Source: Tallec & Ollivier (1804.11188), section 2.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.init.chrono_(throughtime.LSTM(5, 100), max_lag=200)
        >>> (lane,) = insight.record(layer, torch.randn(20, 3, 5)).lanes
        >>> bool(insight.time_constants(lane).max() > 100)
        True
    """
    keep = _keeping_gate(lane)
    mean = keep.mean((0, 1)) if lane.active is None else keep[lane.active].mean(0)
    return 1 / (1 - mean)


@flush_denormals()
def carousel(lane: Lane, lags: int | None = None) -> Float[Tensor, "K"]:
    """Return the mean over steps, rows and units of Π_{j<k} f_{t−j}: what of a state or its gradient the gates alone let by.

    Args:
        lane: A layer and direction of a gated cell.
        lags: K; `None` is T.

    Returns:
        Entry k is the product over k steps, 1 at k = 0; NaN where no sequence is that long. Cost: K·T·B·H.

    Raises:
        InputError: The cell has no gate that keeps the state.

    Source: the constant error carousel of Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000).

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.init.forget_bias_(throughtime.LSTM(5, 8), 3.0)
        >>> (lane,) = insight.record(layer, torch.zeros(20, 3, 5)).lanes
        >>> 0.2 < insight.carousel(lane)[19] < 0.5  # about σ(3)¹⁹ = 0.40
        tensor(True)
    """
    keep = _keeping_gate(lane)
    episodes = lane.episodes
    if lane.reverse:
        keep, episodes = keep.flip(0), episodes.flip(0)
    lags = lane.steps if lags is None else min(lags, lane.steps)
    product, means = torch.ones_like(keep), []
    is_unbroken = lane.begins is None and lane.active is None
    with step_threads(keep.numel()):
        for k in range(lags):
            valid = (episodes[k:] == episodes[: lane.steps - k]) & (episodes[k:] >= 0)
            means.append((product if is_unbroken else product[valid]).mean())
            product = (
                product[:-1] * keep[k + 1 :]
            )  # entry i: the gates from step i, which they act on, to step i + k + 1
    return torch.stack(means)


class PathSplit(NamedTuple):
    """The gradient of the state, cut in two: what came by the direct path alone, and all the rest. Each (K,), by lag.

    Attributes:
        total: φ_k, the norm of the whole gradient.
        direct: The norm of what never went through W_hh: c to c through forget gates, h to h through update gates.
        gates: The norm of the rest, which went through the gates and W_hh at least once.
    """

    total: Float[Tensor, "K"]
    direct: Float[Tensor, "K"]
    gates: Float[Tensor, "K"]


@torch.no_grad()
def path_split(
    recording: Recording, grad_outputs: Outputs, *, lags: int | None = None, probes: int | None = None
) -> list[PathSplit]:
    """Split the gradient of the top layer's state into the additive path and the path through the gates.

        ∂L_s/∂s_t = Π D_j ∂L_s/∂s_s  +  the rest,        D_j = the step's derivative with W_hh = 0

    In an LSTM the first is the constant error carousel: from h_s into c_s, then multiplied by forget gates only. At the lag
    where a network has to remember, total / gates says how much of its gradient it owes to being additive.

    Args:
        recording: The forward pass.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).
        lags: As in `lag_matrix`.
        probes: As in `lag_matrix`.

    Returns:
        One split for each direction of the top layer, means over losses and rows that reach so far. Cost: twice that of
        `lag_matrix`.

    Source: Hochreiter & Schmidhuber (1997), section 4.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.init.chrono_(throughtime.LSTM(5, 8), max_lag=100)
        >>> recording = insight.record(layer, torch.randn(60, 3, 5))
        >>> (split,) = insight.path_split(recording, torch.randn(60, 3, 8))
        >>> bool(split.direct[50] > split.gates[50])  # far back, the additive path carries the gradient
        True
    """
    steps, batch = recording.outputs.shape[:2]
    lags = steps if lags is None else min(lags, steps)
    top = recording.layers[-1]
    sums = {lane.name: torch.zeros(3, lags, dtype=torch.float64) for lane in top}
    counts = {lane.name: torch.zeros(lags, dtype=torch.float64) for lane in top}

    def watch(lane: Lane, span: Span) -> Watch:
        if lane not in top:
            return Watch()
        losses = torch.tensor(span.losses)
        step = Step(lane, len(losses), through_weights=False)
        stacks = tuple(s.new_zeros(len(losses), *s.shape[1:]) for s in lane.states)

        def measure(at: Rows, stack: StepState) -> None:
            direct = tuple(s[at.begin : at.end] for s in stacks)
            lag = (losses[at.begin : at.end] - at.t).abs()
            for mine, whole in zip(direct, stack, strict=True):
                mine[lag == 0] = whole[lag == 0]
            within = lane.episodes[losses[at.begin : at.end]] == lane.episodes[at.t]
            within &= lane.episodes[at.t] >= 0
            norms = [norm(*parts) for parts in (stack, direct, _minus(stack, direct))]
            inside = lag < lags
            for total, part in zip(sums[lane.name], norms, strict=True):
                total.index_add_(0, lag[inside], (part * within).sum(1)[inside])
            counts[lane.name].index_add_(0, lag[inside], within.sum(1).double()[inside])
            step.back(direct, at.t, needs_input=False)
            if lane.passes_on is not None:
                for part in direct:
                    part.mul_(lane.passes_on[at.t][:, None])

        return Watch(states=measure)

    carry(recording, grad_outputs, probe_losses(steps, lags, probes), lags, watch, per_row=batch)
    return [PathSplit(*(sums[lane.name] / counts[lane.name])) for lane in top]


def _minus(a: StepState, b: StepState) -> StepState:
    return tuple(p - q for p, q in zip(a, b, strict=True))


def _keeping_gate(lane: Lane) -> Float[Tensor, "T B H"]:
    """Return the gate that multiplies the state."""
    field = KEEPING.get(lane.cell.spec.base)
    if field is None:
        raise InputError(f"a {lane.cell.spec.name} has no gate that keeps its state; expected an LSTM or a GRU")
    return lane.saved_fields[field]
