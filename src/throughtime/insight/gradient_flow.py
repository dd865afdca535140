"""How far gradients reach: the lag matrix, its curve, horizons, cancellation, and the gradient of the weights taken apart.

N[s, t] = mean over the batch of ‖∂L_s/∂s_t‖ is what the loss of step s still says about the state at step t. Along the lag
k = s − t it is the curve φ_k, whose fall or rise is what "vanishing" and "exploding" name.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from throughtime.cells import Parameters
from throughtime.errors import InputError
from throughtime.insight.adjoint import Rows, Span, Watch, carry, native_norms, norm, total_adjoint
from throughtime.insight.recording import Lane, Recording
from throughtime.insight.threads import step_threads
from throughtime.shapes import Outputs, StepState

SKEWNESS = 1.5  # times Johnson's term: with the term itself intervals cover 1 to 2 % less (docs/log.md)


@dataclass(frozen=True, eq=False)
class LagMatrix:
    """Norms of ∂L_s/∂s_t in one lane, by loss and lag.

    Attributes:
        lane: The lane's name.
        losses: s, the steps whose losses were followed, (S,).
        lags: k, (K,): row s and lag k belong to step t = s − k, or t = s + k where the lane runs in reverse. Below the top of
            a bidirectional stack a loss reaches both sides, and lags are negative too.
        norms: ‖∂L_s/∂s_t‖ over the whole state, (S, K, B); zero where `valid` is false.
        valid: Whether both steps exist and belong to the same sequence, (S, K, B).
        reverse: Whether the lane runs in reverse.
        steps: T.
    """

    lane: str
    losses: Int[Tensor, "S"]
    lags: Int[Tensor, "K"]
    norms: Float[Tensor, "S K B"]
    valid: Bool[Tensor, "S K B"]
    reverse: bool
    steps: int

    @property
    def matrix(self) -> Float[Tensor, "S T"]:
        """N[s, t]: the mean over the rows that have a loss at s, zero where none has."""
        times = self._times()
        has_loss = self.valid[:, self.lags == 0][:, 0].sum(-1, keepdim=True).clamp(min=1)
        matrix = self.norms.new_zeros(len(self.losses), self.steps)
        inside = (times >= 0) & (times < self.steps)
        row, column = inside.nonzero(as_tuple=True)
        matrix[row, times[row, column]] = (self.norms.sum(2) / has_loss)[row, column]
        return matrix

    @property
    def curve(self) -> Float[Tensor, "K"]:
        """φ_k: the mean over losses and rows where step and loss belong to the same sequence; NaN where none do."""
        return _curve(self.norms.sum(0), self.valid.sum(0))

    @property
    def curve_of_rows(self) -> Float[Tensor, "K B"]:
        """φ_k of each batch row by itself; NaN where it has none."""
        return self.norms.sum(0) / self.valid.sum(0)

    def _times(self) -> Int[Tensor, "S K"]:
        return self.losses[:, None] + (self.lags if self.reverse else -self.lags)


@torch.no_grad()
def lag_matrix(
    recording: Recording,
    grad_outputs: Outputs,
    *,
    lags: int | None = None,
    probes: int | None = None,
) -> list[LagMatrix]:
    """Measure ‖∂L_s/∂s_t‖ for each loss s and each step t it depends on, in each lane.

    The state is the whole one: h, and c of an LSTM, seen as two variables, so that a gradient that travels in c is counted. What
    it counts at lag 0 is what the loss itself sends: into h in the top layer, through the layers above it further down.

    Args:
        recording: The forward pass, from `record` or `record_model`.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).
        lags: K, follow each loss over the lags 0 … K − 1 only; `None` follows it to the sequence's beginning.
        probes: M, follow only M losses, spread evenly over the last steps that have the whole window before them.

    Returns:
        One LagMatrix for each lane. Cost: T²/2 steps of the adjoint for all, T·K with a window, M·T with probes; each step is
        one product of the rows that are followed with W_hh.

    Source: the product of Jacobians of Bengio, Simard & Frasconi (1994) and Pascanu et al. (1211.5063, eq. 4), for each loss
        and over (h, c).

    Raises:
        InputError: A shape, `lags` or `probes` doesn't fit.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.LSTM(5, 8), torch.randn(20, 3, 5))
        >>> (lag,) = insight.lag_matrix(recording, torch.ones(20, 3, 8))
        >>> lag.matrix.shape, bool((lag.matrix.triu(1) == 0).all())  # N[s, t] = 0 for t > s
        (torch.Size([20, 20]), True)
        >>> lag.curve.shape
        torch.Size([20])
    """
    steps, batch = recording.outputs.shape[:2]
    lags = _checked_lags(lags, steps)
    losses = probe_losses(steps, lags, probes)
    collected: dict[str, list[Tensor]] = {lane.name: [] for lane in recording.lanes}
    pending: list[tuple[Lane, Span, Tensor, list[Tensor]]] = []

    def watch(lane: Lane, span: Span) -> Watch:
        window = span.window(steps)
        parts = [lane.states[0].new_zeros(len(window), len(span.losses), batch) for _ in lane.states]
        pending.append((lane, span, torch.tensor(span.losses), parts))

        def measure(at: Rows, stack: StepState) -> None:
            for norms, part in zip(parts, stack, strict=True):
                norms[at.t - window[0], at.begin : at.end] = norm(part)

        return Watch(states=measure)

    def gather() -> None:
        """Bring a block's norms from steps to lags, so that only the window is kept."""
        for lane, span, block, parts in pending:
            window = span.window(steps)
            times = _times(block, _lag_range(lags, span.two_sided), lane.reverse)
            inside = (times >= window[0]) & (times <= window[-1])
            place = (times - window[0]).clamp(0, len(window) - 1), torch.arange(len(block))[:, None]
            gathered = [part[place] for part in parts]
            of_all = gathered[0] if len(gathered) == 1 else torch.hypot(gathered[0], gathered[1])
            collected[lane.name].append(of_all * inside[:, :, None])
        pending.clear()

    def watch_and_gather(lane: Lane, span: Span) -> Watch:
        if pending and pending[0][1].losses != span.losses:
            gather()
        return watch(lane, span)

    native = native_norms(recording, grad_outputs, losses, lags)
    if native is not None:
        collected = {lane.name: [norms] for lane, norms in zip(recording.lanes, native, strict=True)}
    else:
        kept = sum(len(lane.states) for lane in recording.lanes) * batch
        carry(recording, grad_outputs, losses, lags, watch_and_gather, per_row=kept)
        gather()
    matrices = []
    for depth, lanes in enumerate(recording.layers):
        two_sided = recording.bidirectional and depth < len(recording.layers) - 1
        for lane in lanes:
            at, reached = torch.tensor(losses), _lag_range(lags, two_sided)
            valid = _valid(lane, at, reached)
            norms = torch.where(valid, torch.cat(collected[lane.name]), 0)
            matrices.append(LagMatrix(lane.name, at, reached, norms, valid, lane.reverse, steps))
    return matrices


def probe_losses(steps: int, lags: int, probes: int | None = None) -> list[int]:
    """Return the steps whose losses are followed: all, or `probes` of them, evenly spread where a whole window precedes."""
    if probes is None or probes >= steps:
        return list(range(steps))
    if probes < 1:
        raise InputError(f"probes = {probes}: expected at least one loss to follow")
    first = min(lags - 1, steps - probes)
    if probes == 1:
        return [steps - 1]
    return sorted({round(first + i * (steps - 1 - first) / (probes - 1)) for i in range(probes)})


@torch.no_grad()
def cancellation(recording: Recording, grad_outputs: Outputs) -> list[Float[Tensor, "T"]]:
    """Measure how far the losses agree on what the state at t should have been.

        κ_t = ‖Σ_s δ_{s,t}‖ / Σ_s ‖δ_{s,t}‖,        δ_{s,t} = ∂L_s/∂s_t

    1 says that all pull the same way, a value near 1/√n that n losses pull in unrelated ways: then a small total gradient is
    not a vanished one. Numerator and denominator are each summed over the batch.

    Args:
        recording: The forward pass.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).

    Returns:
        κ_t of each lane, (T,); NaN where no gradient arrives. Cost: that of `lag_matrix` without a window.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.GRU(5, 8), torch.randn(20, 3, 5))
        >>> (kappa,) = insight.cancellation(recording, torch.randn(20, 3, 8))
        >>> bool((kappa <= 1 + 1e-6).all()), round(kappa[-1].item(), 3)  # the last step has one loss, which agrees with itself
        (True, 1.0)
    """
    steps = recording.outputs.shape[0]
    totals = total_adjoint(recording, grad_outputs)
    sums = [torch.zeros(steps, dtype=torch.float64) for _ in totals]
    index = {lane.name: i for i, lane in enumerate(recording.lanes)}

    def watch(lane: Lane, _: Span) -> Watch:
        def add(at: Rows, stack: StepState) -> None:
            sums[index[lane.name]][at.t] += norm(*stack).sum()

        return Watch(states=add)

    carry(recording, grad_outputs, range(steps), steps, watch)
    return [(norm(*total).sum(1) / s).to(total[0]) for total, s in zip(totals, sums, strict=True)]


class Horizon(NamedTuple):
    """The least lag at which φ_k < ε φ_0, with a confidence interval; `math.inf` says that it lies beyond the window."""

    epsilon: float
    lag: float
    low: float
    high: float


def horizon(lag: LagMatrix, epsilon: float = 1e-3, *, confidence: float = 0.95) -> Horizon:
    """Find K_ε, the least k with φ_k < ε φ_0, and its confidence interval over the rows of the batch.

    At each lag the interval of ln φ_k/φ_0 is Student's, of the jackknife's pseudo-values; `low` and `high` are where its
    two ends first fall below ln ε. It is widened outwards by the jackknife's bias and by one and a half times Johnson's term
    for skewness, since few rows are likely to lack those that decay slowest, which carry the mean; Student's has a degree of
    freedom less for it. Where the rates at which rows decay have a spread (one standard deviation) of 10 to 30 %, 95 %
    intervals over 3 rows or more cover 94 to 99 %, where it is 50 %, 92 to 98 %; the percentile bootstrap covers 65 to 85 %.

    Args:
        lag: A lag matrix.
        epsilon: ε.
        confidence: Of the interval. It is over the rows, sequences that the same weights read; other weights are not in it.

    Returns:
        The horizon; `lag`, `low` and `high` are lags, or `math.inf` beyond the window. With one row `low` and `high` are
        NaN: nothing is known of the others.

    Source: jackknife: Tukey (1958); skewness: Johnson, "Modified t tests and confidence intervals for asymmetrical
        populations" (1978).

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.RNN(5, 8), torch.randn(60, 6, 5))
        >>> (lag,) = insight.lag_matrix(recording, torch.randn(60, 6, 8))
        >>> reach = insight.horizon(lag, 0.01)
        >>> reach.low <= reach.lag <= reach.high
        True
    """
    if not 0 < epsilon < 1:
        raise InputError(f"epsilon = {epsilon}: expected a share between 0 and 1")
    found = _first_below(lag.curve[lag.lags >= 0], epsilon)
    low, high = curve_interval(lag, confidence)
    if low.isnan().all():
        return Horizon(epsilon, found, math.nan, math.nan)
    return Horizon(epsilon, found, min(_first(low < epsilon), found), max(_first(high < epsilon), found))


@step_threads()
def curve_interval(lag: LagMatrix, confidence: float = 0.95) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"]]:
    """Return the ends of the confidence interval of φ_k/φ_0 over the rows, at each lag k ≥ 0; `horizon` says how it is made.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.GRU(5, 8), torch.randn(60, 6, 5))
        >>> (lag,) = insight.lag_matrix(recording, torch.randn(60, 6, 8))
        >>> low, high = insight.curve_interval(lag)
        >>> bool((low <= lag.curve / lag.curve[0] * 1.0001).all()), bool((low <= high).all())
        (True, True)
    """
    forward = lag.lags >= 0
    norms, counts = lag.norms.sum(0)[forward].double(), lag.valid.sum(0)[forward].double()
    has_loss = counts[0] > 0
    norms, counts = norms[:, has_loss], counts[:, has_loss]
    if norms.shape[1] < 2:
        return norms.new_full((len(norms),), math.nan), norms.new_full((len(norms),), math.nan)
    low, high = _log_interval(norms, counts, confidence)
    return low.exp(), high.exp()


def _log_interval(
    norms: Float[Tensor, "K B"], counts: Float[Tensor, "K B"], confidence: float
) -> tuple[Float[Tensor, "K"], Float[Tensor, "K"]]:
    """Return the ends of the interval of ln φ_k/φ_0."""
    from scipy.special import stdtrit  # here, since importing it takes time

    rows = norms.shape[1]
    student = float(stdtrit(max(1, rows - 2), (1 + confidence) / 2))  # mean and skewness take a degree of freedom each
    whole = _log_share(norms.sum(1, keepdim=True), counts.sum(1, keepdim=True))
    without = _log_share(norms.sum(1, keepdim=True) - norms, counts.sum(1, keepdim=True) - counts)
    values = rows * whole - (rows - 1) * without  # one for each row, as if it were an observation of its own
    unbiased = values.mean(1)
    apart = values - unbiased[:, None]
    variance = apart.square().sum(1) / (rows - 1)
    half = student * (variance / rows).sqrt()
    third = apart.pow(3).sum(1) * rows / ((rows - 1) * max(1, rows - 2))
    skew = SKEWNESS * (1 + 2 * student**2) / (6 * rows) * torch.where(variance > 0, third / variance, 0.0)
    whole = whole[:, 0]
    low = torch.minimum(whole, unbiased) - half + skew.clamp(max=0)
    high = torch.maximum(whole, unbiased) + half + skew.clamp(min=0)
    return low, high


def _log_share(norms: Float[Tensor, "K N"], counts: Float[Tensor, "K N"]) -> Float[Tensor, "K N"]:
    """Return ln φ_k/φ_0 of sums of norms over sums of counts; what is gone altogether is taken for 1e-300."""
    curves = (norms / counts).nan_to_num(posinf=torch.finfo(torch.float64).max).clamp(min=1e-300)
    return (curves / curves[0]).log()


def tail_decay(curve: Float[Tensor, "K"], floor: float = 1e-6) -> float:
    """Estimate β = φ_{k+1}/φ_k in the curve's tail: the geometric mean over its later half, down to `floor` · φ_0.

    Below 1 gradients vanish geometrically, above 1 they explode. NaN where the curve is too short to tell.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> round(insight.tail_decay(0.8 ** torch.arange(40)), 4)
        0.8
    """
    usable = (curve > floor * curve[0]) & curve.isfinite()
    end = int((~usable).nonzero()[0]) if not usable.all() else len(curve)
    begin = end // 2
    if end - begin < 2:
        return math.nan
    return math.exp(math.log(curve[end - 1] / curve[begin]) / (end - 1 - begin))


def truncation_bias(curve: Float[Tensor, "K"], length: int) -> float:
    """Estimate which share of the gradient's mass BPTT in chunks of `length` steps loses, as `train --bptt` cuts a text.

        bias(K) ≈ Σ_k φ_k min(k, K)/K ÷ Σ_k φ_k

    A loss whose chunk began j steps ago is followed over the lags 0 … j, and j is each of 0 … K − 1 equally often: so
    lag k is lost to min(k, K) losses of K. Beyond the curve φ goes on with its tail's decay β (`tail_decay`).

    It is an estimate of the relative bias ‖g − ĝ‖/‖g‖ of the gradient of the weights, and no bound of it: where
    gradients of different lags cancel, or add up better than those that are kept, the bias is more or less than their
    norms tell.

    Args:
        curve: φ_k.
        length: K, steps of a chunk.

    Returns:
        A share between 0 and 1; NaN where the curve doesn't decay, so that its mass beyond the window can't be told.

    Source: the loss of mass after Aicher, Foti & Fox (1905.07473), who cut a window before each loss; here it is a chunk's.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> round(insight.truncation_bias(0.5 ** torch.arange(30.0), 10), 3)  # about mean lag / K where K is long: 1/10
        0.1
    """
    if length < 1:
        raise InputError(f"length = {length}: expected at least one step")
    mass = _continued(curve, 50 * max(length, len(curve)))
    if mass is None:
        return math.nan
    lost = (torch.arange(len(mass)) / length).clamp(max=1).to(mass)
    return ((mass * lost).sum() / mass.sum()).item()


def truncation_length(curve: Float[Tensor, "K"], bias: float) -> float:
    """Return the least length of chunks at which BPTT loses at most a share `bias` of the gradient's mass (`truncation_bias`).

    `math.inf` says that the curve doesn't decay, or that more than `bias` of its mass lies beyond the window, where it
    is but guessed.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> insight.truncation_length(0.5 ** torch.arange(30.0), bias=0.1)
        10.0
    """
    if not 0 < bias < 1:
        raise InputError(f"bias = {bias}: expected a share between 0 and 1")
    known = curve[~curve.isnan()]
    mass = _continued(known, 50 * len(known))
    if mass is None or mass[len(known) :].sum() > bias * mass.sum():
        return math.inf
    at = torch.arange(len(mass), dtype=torch.float64)
    mean_lag = ((mass * at).sum() / mass.sum()).item()
    longest = math.ceil(mean_lag / bias)  # there bias(K) ≤ mean lag / K is small enough
    shortest = 1
    while shortest < longest:
        middle = (shortest + longest) // 2
        lost = ((mass * (at / middle).clamp(max=1)).sum() / mass.sum()).item()
        shortest, longest = (shortest, middle) if lost <= bias else (middle + 1, longest)
    return float(max(1, shortest))


def _continued(curve: Float[Tensor, "K"], lags: int) -> Float[Tensor, "N"] | None:
    """Return φ_k over `lags` lags, its tail beyond the window by its decay; `None` where it doesn't decay."""
    known = curve[~curve.isnan()].double()
    if not len(known) or not (known[0] > 0 and known.isfinite().all()):
        return None
    beyond = torch.arange(1, lags - len(known) + 1, dtype=torch.float64)
    if known[-1] < 1e-6 * known[0]:  # nothing to speak of is left
        return torch.cat([known, torch.zeros_like(beyond)])
    beta = tail_decay(known)
    return torch.cat([known, known[-1] * beta**beyond]) if beta < 1 else None


@torch.no_grad()
def itemised_gradients(recording: Recording, grad_outputs: Outputs, *, lags: int | None = None) -> list[Parameters]:
    """Take the gradient of the weights apart as the textbook does: ∂L_s/∂W through each step t = s − k.

        ∂L/∂W = Σ_s ∂L_s/∂W = Σ_s Σ_k ∂L_s/∂s_{s−k} · ∂s_{s−k}/∂W

    Args:
        recording: The forward pass.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).
        lags: K, keep the lags 0 … K − 1; `None` keeps all.

    Returns:
        For each lane the parameters with two leading axes: entry [s, k] is ∂L_s/∂W through step s − k (s + k in reverse),
        summed over the batch. Summed over both axes they are the gradient that `backward` gives. They take S·K times the
        memory of the weights: for looking at short sequences. Lags of the wrong sign, below the top of a bidirectional
        stack, are refused.

    Raises:
        InputError: It would take more than 4 GiB, or the stack is deep and bidirectional.

    Source: Rumelhart, Hinton & Williams (1986), unrolled.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.RNN(5, 4)
        >>> x = torch.randn(6, 2, 5)
        >>> (items,) = insight.itemised_gradients(insight.record(layer, x), torch.ones(6, 2, 4))
        >>> items.weight_hh.shape  # [s, k, H, H]
        torch.Size([6, 6, 4, 4])
        >>> layer(x)[0].sum().backward()
        >>> bool(torch.allclose(items.weight_hh.sum((0, 1)), layer.weight_hh_l0.grad, atol=1e-5))
        True
    """
    steps = recording.outputs.shape[0]
    lags = _checked_lags(lags, steps)
    _check_one_sided(recording)
    weights = sum(w.numel() * w.element_size() for lane in recording.lanes for w in lane.parameters.to_list())
    if (needed := weights * steps * lags) > 1 << 32:
        raise InputError(
            f"{steps} losses × {lags} lags of {weights:,} bytes of weights would take {needed / 2**30:.1f} GiB; expected at "
            "most 4: record fewer steps, give lags=, or use lag_gradients, which sums over the losses"
        )
    return _weight_gradients(recording, grad_outputs, lags, by_loss=True)


@torch.no_grad()
def lag_gradients(recording: Recording, grad_outputs: Outputs, *, lags: int | None = None) -> list[Parameters]:
    """Take the gradient of the weights apart by lag: g = Σ_k g_k, g_k = Σ_s ∂L_s/∂W through step s − k.

    Truncated BPTT over K steps keeps, of each loss, about g_0 … g_{K−1}; what clipping scales down is the same sum.

    Args:
        recording: The forward pass.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).
        lags: K, keep the lags 0 … K − 1; `None` keeps all, and then they add up to the whole gradient.

    Returns:
        For each lane the parameters with a leading axis of lags, summed over losses and the batch. Cost: that of `lag_matrix`
        and one outer product for each loss and lag.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.GRU(5, 4), torch.randn(30, 2, 5))
        >>> (by_lag,) = insight.lag_gradients(recording, torch.ones(30, 2, 4))
        >>> by_lag.weight_hh.flatten(1).norm(dim=1).shape  # the norm of each g_k
        torch.Size([30])
    """
    lags = _checked_lags(lags, recording.outputs.shape[0])
    _check_one_sided(recording)
    return _weight_gradients(recording, grad_outputs, lags, by_loss=False)


def _weight_gradients(recording: Recording, grad_outputs: Outputs, lags: int, by_loss: bool) -> list[Parameters]:
    steps = recording.outputs.shape[0]
    shape = (steps, lags) if by_loss else (lags,)
    sums = {
        lane.name: Parameters.from_list(
            [w.new_zeros(*shape, *w.shape) for w in lane.parameters.to_list()], lane.cell.spec.variant_parameters
        )
        for lane in recording.lanes
    }

    def watch(lane: Lane, span: Span) -> Watch:
        losses = torch.tensor(span.losses)

        def add(at: Rows, gradient: Parameters) -> None:
            of = losses[at.begin : at.end]
            lag = (of - at.t) * (-1 if lane.reverse else 1)
            for total, part in zip(sums[lane.name].to_list(), gradient.to_list(), strict=True):
                if by_loss:
                    total[of, lag] = part
                else:
                    total.index_add_(0, lag, part)

        return Watch(weights=add)

    carry(recording, grad_outputs, range(steps), lags, watch)
    return [sums[lane.name] for lane in recording.lanes]


@torch.no_grad()
def connectivity(recording: Recording, grad_output: Float[Tensor, "B DP"], step: int) -> Float[Tensor, "T B"]:
    """Measure how much one prediction hangs on each earlier input: ‖∂y_s/∂x_t‖ for t ≤ s.

    Args:
        recording: The forward pass.
        grad_output: ∂y_s/∂output_s of the prediction looked at, such as the logit of the likeliest token, (B, directions · P).
        step: s.

    Returns:
        (T, B). Cost: one backward pass.

    Source: Madsen, "Visualizing memorization in RNNs", Distill (2019).

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.GRU(5, 8), torch.randn(20, 3, 5))
        >>> reach = insight.connectivity(recording, torch.ones(3, 8), step=12)
        >>> reach.shape, bool((reach[13:] == 0).all()), bool((reach[12] > 0).all())
        (torch.Size([20, 3]), True, True)
    """
    steps, batch, width = recording.outputs.shape
    if not 0 <= step < steps:
        raise InputError(f"step = {step}: expected one of the recorded steps, 0 to {steps - 1}")
    if grad_output.shape != (batch, width):
        raise InputError(f"grad_output has shape {list(grad_output.shape)}; expected ({batch}, {width})")
    grad_outputs = torch.zeros_like(recording.outputs)
    grad_outputs[step] = grad_output
    x_width = recording.lanes[0].parameters.weight_ih.shape[1]
    grad_inputs = grad_outputs.new_zeros(steps, batch, x_width)

    def watch(lane: Lane, _: Span) -> Watch:
        def add(at: Rows, gradient: StepState) -> None:
            grad_inputs[at.t] += gradient[0][0]

        return Watch(inputs=add if lane.layer == 0 else None)

    carry(recording, grad_outputs, [step], steps, watch)
    return norm(grad_inputs).to(grad_inputs)


@torch.no_grad()
def input_reach(recording: Recording, grad_outputs: Outputs, *, lags: int | None = None) -> Float[Tensor, "S K B"]:
    """Measure how much each loss hangs on each earlier input: ‖∂L_s/∂x_{s−k}‖, for all losses at once.

    Args:
        recording: The forward pass, in one direction.
        grad_outputs: ∂L_s/∂output_s, (T, B, P).
        lags: K, the lags 0 … K − 1; `None` follows each loss to the sequence's beginning.

    Returns:
        (T, K, B), zero where step s − k isn't part of the sequence. Cost: that of `lag_matrix` and one product with W_ih a step.

    Raises:
        InputError: The layer runs both ways, or a shape doesn't fit.

    Source: as `connectivity`, which is this for one prediction.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.GRU(5, 8), torch.randn(20, 3, 5))
        >>> reach = insight.input_reach(recording, torch.ones(20, 3, 8), lags=10)
        >>> reach.shape, bool((reach[4, 5:] == 0).all())  # step 4 has four before it
        (torch.Size([20, 10, 3]), True)
    """
    if recording.bidirectional:
        raise InputError(
            "a layer that runs both ways sees later inputs too; expected one direction, or use connectivity"
        )
    steps, batch = recording.outputs.shape[:2]
    lags = _checked_lags(lags, steps)
    reach = recording.outputs.new_zeros(steps, lags, batch)

    def watch(lane: Lane, span: Span) -> Watch:
        losses = torch.tensor(span.losses)

        def measure(at: Rows, gradient: StepState) -> None:
            of = losses[at.begin : at.end]
            reach[of, of - at.t] = norm(gradient[0]).to(reach)

        return Watch(inputs=measure if lane.layer == 0 else None)

    carry(recording, grad_outputs, range(steps), lags, watch)
    return reach


def _times(losses: Tensor, lags: Tensor, reverse: bool) -> Tensor:
    return losses[:, None] + (lags if reverse else -lags)


def _lag_range(lags: int, two_sided: bool) -> Tensor:
    return torch.arange(1 - lags if two_sided else 0, lags)


def _valid(lane: Lane, losses: Tensor, lags: Tensor) -> Bool[Tensor, "S K B"]:
    """Return which pairs of loss and lag lie within one sequence of their row."""
    times = _times(losses, lags, lane.reverse)
    inside = (times >= 0) & (times < lane.steps)
    here = lane.episodes[losses][:, None]
    there = lane.episodes[times.clamp(0, lane.steps - 1)]
    return inside[:, :, None] & (here == there) & (here >= 0)


def _curve(sums: Float[Tensor, "K B"], counts: Tensor) -> Float[Tensor, "K"]:
    return sums.sum(1) / counts.sum(1)


def _first_below(curve: Tensor, epsilon: float) -> float:
    return _first(curve < epsilon * curve[0])


def _first(is_there: Bool[Tensor, "K"]) -> float:
    at = is_there.nonzero()
    return float(at[0]) if len(at) else math.inf


def _checked_lags(lags: int | None, steps: int) -> int:
    if lags is not None and lags < 1:
        raise InputError(f"lags = {lags}: expected at least 1, the lag 0 of a loss and its own step")
    return steps if lags is None else min(lags, steps)


def _check_one_sided(recording: Recording) -> None:
    if recording.bidirectional and len(recording.layers) > 1:
        raise InputError(
            "in a deep bidirectional stack a loss reaches steps on both sides, so the weights' gradient has no lag; expected "
            "one layer, or one direction"
        )
