"""What a network's gradients do, in one report: a verdict, how far they reach, what carries them, and what to try.

`measure` takes a recording apart; `measure_finite` records again in float64 where float32 doesn't hold it; `try_starts`
measures other ways to start, so that advice is a measurement.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from throughtime import init
from throughtime.errors import InputError, unknown_name
from throughtime.insight.clipping import clip_statistics
from throughtime.insight.gates import KEEPING, GateUse, PathSplit, carousel, gate_use, path_split, time_constants
from throughtime.insight.gradient_flow import (
    Horizon,
    LagMatrix,
    cancellation,
    curve_interval,
    horizon,
    lag_matrix,
    tail_decay,
    truncation_bias,
    truncation_length,
)
from throughtime.insight.recording import Lane, ModelRecording, record, record_model
from throughtime.insight.spectrum import SpectralBound, lyapunov_spectrum, pascanu_bound, step_size
from throughtime.insight.threads import step_threads
from throughtime.insight.verdict import VANISHED, Need, Overflow, Verdict, judge
from throughtime.layers import GRU, LSTM, RNN, Recurrent
from throughtime.plain import finite
from throughtime.training.tbptt import Streams

EPSILONS = (0.5, 0.01, 0.001)
BIASES = (0.1, 0.01)
QUANTILES = (0.1, 0.5, 0.9)
EXPONENTS = 4
LAGS = 200  # over which losses are followed, unless more are needed
ROWS = 16  # sequences measured side by side: what the confidence intervals are taken over
WINDOW = 64  # steps of BPTT, where no run says how many it was trained with
TRIAL_PROBES, TRIAL_ROWS = 3, 4
PATH_PROBES = 3  # at most, of every row; a path's share is told in two digits
AGREEMENT_STEPS, AGREEMENT_PAIRS = 256, 1 << 13  # most steps, and most pairs of a loss and a step, but for one row's
TRIAL_SEEDS = 3  # other starts are never ranked by one draw of the weights
NOISE_WIDTH = 8  # inputs of a layer that is shown white noise
LARGEST_DECOMPOSED = 512  # width of a state up to which its Jacobian's eigenvalues are taken

Tell = Callable[[str], None]
Recorder = Callable[[torch.dtype], ModelRecording]
T = TypeVar("T")
LAYERS: dict[str, Callable[..., Recurrent]] = {
    "rnn": RNN,
    "rnn_relu": lambda *sizes: RNN(*sizes, nonlinearity="relu"),
    "lstm": LSTM,
    "gru": GRU,
}


@dataclass(frozen=True)
class LaneReport:
    """What one layer in one direction does to gradients.

    Attributes:
        name: "layer 0", "layer 0, reverse".
        parts: What its state consists of, whose gradient is measured in one norm: "h", or "h, c" of an LSTM.
        lag: Its lag matrix.
        between: The ends of the confidence interval of φ_k / φ_0, by lag, (2, K); NaN where there is one row.
        quantiles: Of ‖∂L_s/∂s_t‖ / φ_0 over losses and rows, by lag, (3, K): `QUANTILES` of what φ_k / φ_0 is the mean of.
        horizons: K_ε for each of `EPSILONS`.
        decay: β, the tail's factor per step.
        window: K, the steps of BPTT that `bias` and `agreement` are for.
        bias: Share of the gradient's mass that BPTT in chunks of `window` steps loses; NaN where it can't be told.
        truncation: For each of `BIASES`, the length of chunks that loses no more.
        agreement: Median of the cancellation index κ_t over `agreement_steps` steps; NaN where it isn't taken.
        agreement_steps: The last ones, as many as `window` where that isn't more than `AGREEMENT_STEPS` or were recorded.
        exponents: The largest Lyapunov exponents, nats per step, in descending order: means over the rows.
        exponent_range: The lowest and the highest row's largest exponent; `None` where there are none.
        norm: Mean largest singular value of a step's Jacobian; NaN where the state is wider than `LARGEST_DECOMPOSED`.
        radius: Mean spectral radius of it, or NaN.
        bound: γ σ_max(W_hh) of a simple RNN.
        gates: How open its gates stand.
        constants: Memory time constants in steps: smallest, median, largest; `None` without a keeping gate.
        carousel: What the keeping gates alone let by, by lag.
        split: The additive path and the gates', of the top layer; `None` without a keeping gate.
    """

    name: str
    parts: str
    lag: LagMatrix
    between: Tensor
    quantiles: Tensor
    horizons: list[Horizon]
    decay: float
    window: int
    bias: float
    truncation: list[float]
    agreement: float
    agreement_steps: int
    exponents: list[float]
    exponent_range: tuple[float, float] | None
    norm: float
    radius: float
    bound: SpectralBound | None
    gates: list[GateUse]
    constants: tuple[float, float, float] | None
    carousel: list[float] | None
    split: PathSplit | None

    @property
    def curve(self) -> list[float]:
        """φ_k / φ_0 for k ≥ 0."""
        curve = self.lag.curve[self.lag.lags >= 0].double()
        return (curve / curve[0]).tolist()

    def judge(self, need: Need, overflow: Overflow | None) -> Verdict:
        """Say what its curve comes to within the steps that are needed."""
        low, high = self.between.tolist()
        return judge(self.curve, self.horizons[-1], need, overflow, (low, high))


class Reach(NamedTuple):
    """Where 1/1000 of a gradient is left in fresh networks that differ in their seed: the median, the lowest and the highest."""

    lag: float
    low: float
    high: float


@dataclass(frozen=True)
class Trial:
    """How far gradients reach in fresh networks of one cell and start.

    Attributes:
        cell: As the command line names it.
        init: How they were started.
        lags: Where 1/1000 is left, for each seed; `math.inf` beyond the window.
        at_last_lag: φ_k / φ_0 at the last lag, the median over the seeds.
        kinds: The verdict for each seed.
    """

    cell: str
    init: str
    lags: list[float]
    at_last_lag: float
    kinds: list[str]

    @property
    def reach(self) -> Reach:
        """Where 1/1000 is left, over the seeds."""
        return Reach(statistics.median(self.lags), min(self.lags), max(self.lags))

    @property
    def rank(self) -> tuple[float, float]:
        """What starts are compared by: how far, then how much is left at the last lag."""
        return self.reach.lag, self.at_last_lag


class ClipReport(NamedTuple):
    """What clipping met while a run was trained.

    Attributes:
        share: Share of the steps that were clipped.
        steps: Of how many steps.
        logged: Of how many of them the norm was logged, which the other figures are taken over.
        scale: Mean factor of those that were clipped.
        median: Median norm before clipping.
        largest: Largest norm before clipping.
        not_finite: How many norms were infinite or no number.
    """

    share: float
    steps: int
    logged: int
    scale: float
    median: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class GradientReport:
    """The whole report.

    Attributes:
        subject: What was measured, in a line.
        source: On what, in a line.
        cell: Its cell, as the command line names it.
        steps: T of the recording.
        rows: B of the recording.
        losses: How many losses were followed.
        lags: Over how many lags.
        lanes: From the bottom layer to the top.
        trials: Other ways to start, measured.
        fresh: Fresh networks started as the subject was, with several seeds; `None` where they weren't measured.
        need: Over how many steps gradients have to reach.
        overflow: Where the states were too large for float32, or for float64.
        dtype: What it was measured in.
        is_trained: Whether the subject is a run.
        clip: What clipping met while a run was trained.
    """

    subject: str
    source: str
    cell: str
    steps: int
    rows: int
    losses: int
    lags: int
    lanes: list[LaneReport]
    trials: list[Trial]
    fresh: Trial | None = None
    need: Need = Need()  # noqa: RUF009 a constant
    overflow: Overflow | None = None
    dtype: str = "float32"
    is_trained: bool = False
    clip: ClipReport | None = None

    @property
    def top(self) -> LaneReport:
        """The top layer, forward: where the losses enter, and what the verdict is about."""
        return next(lane for lane in reversed(self.lanes) if not lane.lag.reverse)

    @property
    def advice(self) -> list[Trial]:
        """Other starts that reach further than what was measured, and than its own fresh start, and don't explode."""
        curve = self.top.curve
        own = max([(self.top.horizons[-1].lag, curve[-1])] + ([self.fresh.rank] if self.fresh else []))
        return [trial for trial in self.trials if trial.rank > own and "exploding" not in trial.kinds]

    @property
    def verdict(self) -> Verdict:
        """What it comes to."""
        return self.top.judge(self.need, self.overflow)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON holds it; what lies beyond the window, or can't be told, is null."""
        verdict = self.verdict
        return finite(
            {
                "subject": self.subject,
                "source": self.source,
                "cell": self.cell,
                "verdict": verdict.kind,
                "sentence": verdict.sentence,
                "needed": self.need._asdict(),
                "overflow": None if self.overflow is None else self.overflow._asdict(),
                "dtype": self.dtype,
                "steps": self.steps,
                "rows": self.rows,
                "losses": self.losses,
                "lags": self.lags,
                "lanes": [_lane_record(lane) for lane in self.lanes],
                "fresh": None if self.fresh is None else _trial_record(self.fresh),
                "trials": [_trial_record(t) | {"reaches_further": t in self.advice} for t in self.trials],
                "clip": None if self.clip is None else self.clip._asdict(),
            }
        )


def make_layer(cell: str, hidden_size: int, num_layers: int = 1, names: str = "default") -> Recurrent:
    """Return a fresh layer for white noise, `NOISE_WIDTH` inputs wide.

    Raises:
        InputError: The cell, a size or the initialisation can't be.
    """
    if cell not in LAYERS:
        raise unknown_name("cell", cell, LAYERS)
    for flag, value in (("--hidden", hidden_size), ("--layers", num_layers)):
        if value < 1:
            raise InputError(f"{flag} {value}: expected a whole number, at least 1")
    return init.initialise_(LAYERS[cell](NOISE_WIDTH, hidden_size, num_layers), names)


def record_noise(
    layer: Recurrent, steps: int, seed: int = 1, *, rows: int = ROWS, dtype: torch.dtype = torch.float32
) -> ModelRecording:
    """Record a layer on white noise, with losses that each send a gradient of length 1 and random direction into h."""
    generator = torch.Generator().manual_seed(seed)
    recording = record(layer, torch.randn(steps, rows, layer.input_size, generator=generator), dtype=dtype)
    gradient = torch.randn(recording.outputs.shape, generator=generator)
    return ModelRecording(recording, normalize(gradient, dim=2).to(dtype))


def record_text(
    model: nn.Module,
    tokens: NDArray[np.integer],
    steps: int,
    *,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float32,
) -> ModelRecording:
    """Record a language model on a text, read as up to `rows` pieces side by side; the losses are −ln p(next token).

    Args:
        model: `model(ids (T, B)) -> (logits (T, B, V), state)`; its weights are brought to `dtype`.
        tokens: Ids (N,).
        steps: T.
        rows: B, if the text is long enough.
        dtype: What to compute in.

    Raises:
        InputError: The text has fewer than T + 1 tokens.
    """
    rows = min(rows, (len(tokens) - 1) // steps)
    if rows < 1:
        raise InputError(
            f"the text has {len(tokens):,} tokens; expected at least {steps + 1:,}: give more text, or lower --lags or --probe"
        )
    ids, targets = Streams(tokens, rows, steps).window_at(0)

    def losses(result: tuple[Tensor, object]) -> Tensor:
        return cross_entropy(result[0].flatten(0, 1), targets.flatten(), reduction="none")

    return record_model(model.to(dtype), (ids,), losses)


class Measured(NamedTuple):
    """A recording, and what it came to.

    Attributes:
        recorded: The forward pass and the losses' gradients, as far as its states are finite.
        lanes: A report for each lane, from the bottom.
        overflow: Where the states were too large for float32, or for float64.
    """

    recorded: ModelRecording
    lanes: list[LaneReport]
    overflow: Overflow | None


def measure_finite(recorder: Recorder, **options: Any) -> Measured:
    """Record in float32 and measure; where it holds neither the states nor their gradients, do it again in float64.

    Where the states overflow float64 too, the steps before that are measured.

    Args:
        recorder: Records in a dtype.
        options: As `measure` takes them.

    Raises:
        InputError: Not even the first two states are finite.
    """
    return Measured(
        *_finite(recorder, lambda recorded: measure(recorded, **options), lambda lanes: [lane.lag for lane in lanes])
    )


def _finite(
    recorder: Recorder, take: Callable[[ModelRecording], T], matrices: Callable[[T], Sequence[LagMatrix]]
) -> tuple[ModelRecording, T, Overflow | None]:
    """Record in float32 and take something of it; in float64 where states or `matrices` of what was taken aren't finite."""
    recorder = step_threads()(recorder)
    recorded = recorder(torch.float32)
    overflow = find_overflow(recorded)
    if overflow is None:
        taken = take(recorded)
        if all(lag.norms.isfinite().all() for lag in matrices(taken)):
            return recorded, taken, None
    recorded = recorder(torch.float64)
    again = find_overflow(recorded)
    if again is not None:
        if again.step < 2:
            raise InputError(
                f"the state of step {again.step} isn't finite, not even in float64, so there is nothing to measure; "
                "expected finite weights and inputs"
            )
        overflow, recorded = again, recorded.part(steps=slice(again.step))
    return recorded, take(recorded), overflow


@step_threads()
def find_overflow(recorded: ModelRecording) -> Overflow | None:
    """Return the first step at which a state of any lane, or what its loss sends into the layer, isn't finite."""
    recording, gradients = recorded
    parts = [part for lane in recording.lanes for part in lane.states] + [gradients]
    is_whole = torch.stack([part.isfinite().flatten(1).all(1) for part in parts]).all(0)
    gone = (~is_whole).nonzero()
    return Overflow(str(recording.outputs.dtype).removeprefix("torch."), int(gone[0])) if len(gone) else None


def measure(
    recorded: ModelRecording,
    *,
    lags: int,
    probes: int,
    window: int = WINDOW,
    agreement: bool = True,
    tell: Tell = lambda _: None,
) -> list[LaneReport]:
    """Measure every lane of a recording.

    Args:
        recorded: The forward pass and the losses' gradients.
        lags: Over how many lags to follow each loss.
        probes: How many losses to follow.
        window: Steps of BPTT whose bias is estimated, and over which losses may agree.
        agreement: Whether to take κ; where the losses are random directions it but counts them.
        tell: Called with what is measured next.

    Returns:
        A report for each lane, from the bottom.
    """
    recording, gradients = recorded
    tell("following each loss back through the layers")
    matrices = lag_matrix(recording, gradients, lags=lags, probes=probes)
    agreements: list[Tensor | None] = [None] * len(matrices)
    if agreement:
        tell("asking whether the losses agree")
        agreements = [*cancellation(*_last_steps(recorded, window))]
    splits: list[PathSplit | None] = [None] * len(matrices)
    if _has_keeping_gate(recording.lanes[-1]):
        tell("splitting the gradient by its paths")
        of_top = path_split(recording, gradients, lags=lags, probes=min(probes, PATH_PROBES))
        splits[-len(of_top) :] = of_top
    reports = []
    for lane, lag, kappa, split in zip(recording.lanes, matrices, agreements, splits, strict=True):
        tell(f"taking the spectrum of {lane.name}")
        reports.append(_measure_lane(lane, lag, kappa, split, lags, window))
    return reports


def _last_steps(recorded: ModelRecording, window: int) -> ModelRecording:
    """Return the last steps of a recording, in as many rows as it doesn't take long to follow each of their losses in."""
    steps = min(window, AGREEMENT_STEPS, len(recorded.grad_outputs))
    return recorded.part(slice(max(1, 2 * AGREEMENT_PAIRS // steps**2)), slice(-steps, None))


def starts_to_try(cell: str, lags: int) -> list[tuple[str, str]]:
    """Return the cells and initialisations worth trying instead of a cell's own start."""
    longest = max(3, lags)
    if cell.startswith("rnn"):
        return [(cell, "orthogonal"), (cell, "orthogonal:1.2"), ("gru", "update:3"), ("lstm", "forget:3")]
    gated = "forget" if cell == "lstm" else "update"
    return [(cell, f"{gated}:1"), (cell, f"{gated}:3"), (cell, f"chrono:{longest}")]


def try_start(
    recorders: Sequence[Recorder],
    cell: str,
    names: str,
    lags: int,
    need: Need = Need(),  # noqa: B008
) -> Trial:
    """Measure how far gradients reach in fresh networks of one cell and start.

    Args:
        recorders: Each records a network in a dtype; they differ in the seed of their weights.
        cell: The cell.
        names: How they are started.
        lags: Over how many lags.
        need: Over how many steps gradients have to reach.
    """
    reaches, left, kinds = [], [], []
    for recorder in recorders:
        _, (lag,), overflow = _finite(
            recorder, lambda r: lag_matrix(*r, lags=lags, probes=TRIAL_PROBES)[-1:], lambda found: found
        )
        curve, reach = lag.curve[lag.lags >= 0].double(), horizon(lag, VANISHED)
        curve = (curve / curve[0]).tolist()
        reaches.append(reach.lag)
        left.append(curve[-1])
        low, high = (edge.tolist() for edge in curve_interval(lag))
        kinds.append(judge(curve, reach, need, overflow, (low, high)).kind)
    return Trial(cell, names, reaches, statistics.median(left), kinds)


def clip_report(
    norms: Sequence[float], max_norm: float, share: float | None = None, steps: int | None = None
) -> ClipReport | None:
    """Summarise what clipping met; `None` where no norm was logged or nothing was clipped by the norm.

    Args:
        norms: The gradient norms that a run logged.
        max_norm: Where they were clipped.
        share: Share of all steps that were clipped, if the run counted them.
        steps: How many steps those are.
    """
    if not norms or not max_norm:
        return None
    logged = clip_statistics(torch.tensor(norms, dtype=torch.float64), max_norm)
    counted = (logged.share, len(norms)) if share is None or steps is None else (share, steps)
    return ClipReport(*counted, len(norms), logged.scale, logged.median, logged.largest, logged.not_finite)


def _measure_lane(
    lane: Lane, lag: LagMatrix, kappa: Tensor | None, split: PathSplit | None, lags: int, window: int
) -> LaneReport:
    curve = lag.curve[lag.lags >= 0]
    has_keeping_gate = _has_keeping_gate(lane)
    norm, radius = _step_size(lane)
    spectrum = _spectrum(lane)
    return LaneReport(
        name=lane.name,
        parts=", ".join(("h", "c")[: len(lane.states)]),
        lag=lag,
        between=torch.stack(curve_interval(lag)),
        quantiles=_quantiles_by_lag(lag),
        horizons=[horizon(lag, epsilon) for epsilon in EPSILONS],
        decay=tail_decay(curve),
        window=window,
        bias=truncation_bias(curve, window),
        truncation=[truncation_length(curve, bias) for bias in BIASES],
        agreement=math.nan if kappa is None else kappa.nanquantile(0.5).item(),
        agreement_steps=0 if kappa is None else len(kappa),
        exponents=[] if spectrum is None else spectrum.mean(0).tolist(),
        exponent_range=None if spectrum is None else (spectrum[:, 0].min().item(), spectrum[:, 0].max().item()),
        norm=norm,
        radius=radius,
        bound=pascanu_bound(lane) if lane.cell.spec.name in ("rnn_tanh", "rnn_relu") else None,
        gates=gate_use(lane),
        constants=_quantiles(time_constants(lane)) if has_keeping_gate else None,
        carousel=carousel(lane, lags).tolist() if has_keeping_gate else None,
        split=split,
    )


def _has_keeping_gate(lane: Lane) -> bool:
    return lane.cell.spec.base in KEEPING


def _spectrum(lane: Lane) -> Tensor | None:
    """Return the largest exponents of each row, (B, M); `None` where the sequences have ends."""
    if lane.begins is not None or lane.active is not None:
        return None
    aside = min(50, lane.steps // 4)
    return lyapunov_spectrum(lane, min(EXPONENTS, sum(lane.widths)), skip=aside, leave=aside)


def _step_size(lane: Lane) -> tuple[float, float]:
    """Return norm and spectral radius, means over four steps of the first row."""
    if sum(lane.widths) > LARGEST_DECOMPOSED:
        return math.nan, math.nan
    steps = sorted({lane.steps * i // 4 for i in range(1, 4)} | {lane.steps - 1})
    size = step_size(lane.part(slice(0, 1)), steps)
    return size.norm.mean().item(), size.radius.mean().item()


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = values.quantile(values.new_tensor([0.0, 0.5, 1.0])).tolist()
    return low, middle, high


@step_threads()
def _quantiles_by_lag(lag: LagMatrix) -> Tensor:
    """Return quantiles of ‖∂L_s/∂s_t‖ / φ_0 over losses and rows, (3, K)."""
    forward = lag.lags >= 0
    norms = torch.where(lag.valid, lag.norms, math.nan)[:, forward].double()
    wanted = norms.new_tensor(QUANTILES)
    each = [norms[:, k].flatten().nanquantile(wanted) for k in range(norms.shape[1])]
    return torch.stack(each, dim=1) / lag.curve[forward][0].double()


def _lane_record(lane: LaneReport) -> dict[str, Any]:
    return {
        "name": lane.name,
        "state": lane.parts,
        "curve": lane.curve,
        "interval": dict(zip(("low", "high"), lane.between.tolist(), strict=True)),
        "quantiles": [
            {"quantile": q, "curve": values} for q, values in zip(QUANTILES, lane.quantiles.tolist(), strict=True)
        ],
        "horizons": [h._asdict() for h in lane.horizons],
        "decay_per_step": lane.decay,
        "truncation": {"bptt": lane.window, "bias": lane.bias},
        "truncation_lengths": [{"bias": b, "steps": k} for b, k in zip(BIASES, lane.truncation, strict=True)],
        "cancellation": lane.agreement,
        "cancellation_steps": lane.agreement_steps,
        "lyapunov_exponents": lane.exponents,
        "lyapunov_range": lane.exponent_range,
        "jacobian_norm": lane.norm,
        "jacobian_spectral_radius": lane.radius,
        "bound": None if lane.bound is None else lane.bound._asdict(),
        "gates": [gate._asdict() for gate in lane.gates],
        "time_constants": lane.constants,
        "carousel": lane.carousel,
        "paths": None if lane.split is None else {name: part.tolist() for name, part in lane.split._asdict().items()},
    }


def _trial_record(trial: Trial) -> dict[str, Any]:
    return {
        "cell": trial.cell,
        "init": trial.init,
        "seeds": len(trial.lags),
        "reach": trial.reach._asdict(),
        "lags": trial.lags,
        "at_last_lag": trial.at_last_lag,
        "verdicts": trial.kinds,
    }
