"""What a network's gradients do, in one report: a verdict, how far they reach, what carries them, and what to try.

`measure` takes a recording apart; `judge` says what it comes to; `try_starts` measures other ways to start, so that advice is a
measurement.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from throughtime import init
from throughtime.errors import InputError, unknown_name
from throughtime.insight.clipping import ClipStatistics, clip_statistics
from throughtime.insight.gates import KEEPING, GateUse, PathSplit, carousel, gate_use, path_split, time_constants
from throughtime.insight.gradient_flow import (
    Horizon,
    LagMatrix,
    cancellation,
    horizon,
    lag_matrix,
    tail_decay,
    truncation_length,
)
from throughtime.insight.recording import Lane, ModelRecording, record, record_model
from throughtime.insight.spectrum import SpectralBound, lyapunov_spectrum, pascanu_bound, step_size
from throughtime.layers import GRU, LSTM, RNN, Recurrent
from throughtime.plain import finite
from throughtime.training.tbptt import Streams

EPSILONS = (0.5, 0.01, 0.001)
BIASES = (0.1, 0.01)
EXPONENTS = 8
ROWS = 8  # sequences measured side by side: what the confidence intervals are taken over
NOISE_WIDTH = 8  # inputs of a layer that is shown white noise
LARGEST_DECOMPOSED = 512  # width of a state up to which its Jacobian's eigenvalues are taken
EXPLODED, VANISHED = 10.0, 1e-3

_LAYERS: dict[str, Callable[..., Recurrent]] = {
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
        lag: Its lag matrix.
        horizons: K_ε for each of `EPSILONS`.
        decay: β, the tail's factor per step.
        truncation: For each of `BIASES`, the length of truncated BPTT that keeps all but that share.
        agreement: Median of the cancellation index κ_t over the steps.
        exponents: The largest Lyapunov exponents, nats per step.
        norm: Mean largest singular value of a step's Jacobian; NaN where the state is too wide to tell quickly.
        radius: Mean spectral radius of it, or NaN.
        bound: γ σ_max(W_hh) of a simple RNN.
        gates: How open its gates stand.
        constants: Memory time constants in steps: smallest, median, largest; `None` without a keeping gate.
        carousel: What the keeping gates alone let by, by lag.
        split: The additive path and the gates', of the top layer.
    """

    name: str
    lag: LagMatrix
    horizons: list[Horizon]
    decay: float
    truncation: list[float]
    agreement: float
    exponents: list[float]
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
        curve = self.lag.curve[self.lag.lags >= 0]
        return (curve / curve[0]).tolist()


class Verdict(NamedTuple):
    """What it comes to: "vanishing", "exploding" or "healthy", and a sentence that says so with figures."""

    kind: str
    sentence: str


class Trial(NamedTuple):
    """How far gradients reach when a fresh network is started in another way."""

    cell: str
    init: str
    horizon: Horizon
    at_last_lag: float


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
    clip: ClipStatistics | None = None

    @property
    def top(self) -> LaneReport:
        """The top layer, forward: where the losses enter, and what the verdict is about."""
        return next(lane for lane in reversed(self.lanes) if not lane.lag.reverse)

    @property
    def advice(self) -> list[Trial]:
        """The other ways to start that were measured to reach further than what was measured does."""
        own = self.top.horizons[-1].lag, self.top.curve[-1]
        return [trial for trial in self.trials if (trial.horizon.lag, trial.at_last_lag) > own]

    @property
    def verdict(self) -> Verdict:
        """What it comes to."""
        return judge(self.top.curve, self.top.horizons[-1])

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
                "steps": self.steps,
                "rows": self.rows,
                "losses": self.losses,
                "lags": self.lags,
                "lanes": [_lane_record(lane) for lane in self.lanes],
                "trials": [
                    {
                        "cell": t.cell,
                        "init": t.init,
                        "horizon": t.horizon._asdict(),
                        "at_last_lag": t.at_last_lag,
                        "reaches_further": t in self.advice,
                    }
                    for t in self.trials
                ],
                "clip": None if self.clip is None else self.clip._asdict(),
            }
        )


def make_layer(cell: str, hidden_size: int, num_layers: int = 1, names: str = "default") -> Recurrent:
    """Return a fresh layer for white noise, `NOISE_WIDTH` inputs wide.

    Raises:
        InputError: The cell, a size or the initialisation can't be.
    """
    if cell not in _LAYERS:
        raise unknown_name("cell", cell, _LAYERS)
    for flag, value in (("--hidden", hidden_size), ("--layers", num_layers)):
        if value < 1:
            raise InputError(f"{flag} {value}: expected a whole number, at least 1")
    return init.initialise_(_LAYERS[cell](NOISE_WIDTH, hidden_size, num_layers), names)


def record_noise(layer: Recurrent, steps: int, seed: int = 1) -> ModelRecording:
    """Record a layer on white noise, with losses that each send a gradient of length 1 and random direction into h."""
    generator = torch.Generator().manual_seed(seed)
    recording = record(layer, torch.randn(steps, ROWS, layer.input_size, generator=generator))
    gradient = torch.randn(recording.outputs.shape, generator=generator)
    return ModelRecording(recording, normalize(gradient, dim=2))


def record_text(model: nn.Module, tokens: NDArray[np.integer], steps: int) -> ModelRecording:
    """Record a language model on a text, read as up to `ROWS` pieces side by side; the losses are −ln p(next token).

    Args:
        model: `model(ids (T, B)) -> (logits (T, B, V), state)`.
        tokens: Ids (N,).
        steps: T.

    Raises:
        InputError: The text has fewer than T + 1 tokens.
    """
    rows = min(ROWS, (len(tokens) - 1) // steps)
    if rows < 1:
        raise InputError(
            f"the text has {len(tokens):,} tokens; expected at least {steps + 1:,}: give more text, or lower --lags or --probe"
        )
    ids, targets = Streams(tokens, rows, steps).window_at(0)

    def losses(result: tuple[Tensor, object]) -> Tensor:
        return cross_entropy(result[0].flatten(0, 1), targets.flatten(), reduction="none")

    return record_model(model, (ids,), losses)


def measure(recorded: ModelRecording, *, lags: int, probes: int) -> list[LaneReport]:
    """Measure every lane of a recording.

    Args:
        recorded: The forward pass and the losses' gradients.
        lags: Over how many lags to follow each loss.
        probes: How many losses to follow.

    Returns:
        A report for each lane, from the bottom.
    """
    recording, gradients = recorded
    matrices = lag_matrix(recording, gradients, lags=lags, probes=probes)
    agreements = cancellation(recording, gradients)
    splits = path_split(recording, gradients, lags=lags, probes=probes)
    first_of_top = len(recording.lanes) - len(splits)
    reports = []
    for index, (lane, lag, agreement) in enumerate(zip(recording.lanes, matrices, agreements, strict=True)):
        split = splits[index - first_of_top] if index >= first_of_top else None
        reports.append(_measure_lane(lane, lag, agreement, split, lags))
    return reports


def judge(curve: Sequence[float], reach: Horizon) -> Verdict:
    """Say in words what a lag curve comes to.

    Exploding: somewhere it is ten times its start or more. Vanishing: within the window it falls below a thousandth of it.
    Healthy: neither.

    Args:
        curve: φ_k / φ_0.
        reach: K_ε at ε = 1/1000.

    Example:
        >>> judge([0.9**k for k in range(11)], Horizon(0.001, math.inf, math.inf, math.inf)).sentence
        "healthy: at lag 10, 0.35 of a loss's gradient is left"
    """
    told = [value for value in curve if not math.isnan(value)]
    largest = max(told)
    last = len(told) - 1
    if largest >= EXPLODED:
        at = told.index(largest)
        return Verdict("exploding", f"exploding: the gradient of a loss has grown ×{largest:.3g} at lag {at}")
    if reach.lag < math.inf:
        return Verdict(
            "vanishing",
            f"vanishing beyond lag {reach.lag:.0f} {interval(reach)}: less than 1/1000 of a loss's gradient is left",
        )
    return Verdict("healthy", f"healthy: at lag {last}, {told[last]:.2g} of a loss's gradient is left")


def interval(reach: Horizon) -> str:
    """Return a horizon's confidence interval as it is printed: [31–37]."""
    low, high = ("beyond" if edge == math.inf else f"{edge:.0f}" for edge in (reach.low, reach.high))
    return f"[{low}–{high}]"


def starts_to_try(cell: str, lags: int) -> list[tuple[str, str]]:
    """Return the cells and initialisations worth trying instead of a cell's own start."""
    longest = max(3, lags)
    if cell.startswith("rnn"):
        return [(cell, "orthogonal"), (cell, "orthogonal:1.2"), ("gru", "update:3"), ("lstm", "forget:3")]
    gated = "forget" if cell == "lstm" else "update"
    return [(cell, f"{gated}:1"), (cell, f"{gated}:3"), (cell, f"chrono:{longest}")]


def try_starts(
    fresh: Callable[[str, str], ModelRecording], starts: Sequence[tuple[str, str]], lags: int, probes: int = 16
) -> list[Trial]:
    """Measure how far gradients reach in fresh networks.

    Args:
        fresh: Makes and records the network of a cell and an initialisation.
        starts: Which.
        lags: Over how many lags.
        probes: How many losses to follow.
    """
    trials = []
    for cell, names in starts:
        recording, gradients = fresh(cell, names)
        lag = lag_matrix(recording, gradients, lags=lags, probes=probes)[-1]
        curve = lag.curve[lag.lags >= 0]
        trials.append(Trial(cell, names, horizon(lag, VANISHED), (curve[-1] / curve[0]).item()))
    return trials


def clip_report(norms: Sequence[float], max_norm: float) -> ClipStatistics | None:
    """Summarise a run's logged gradient norms; `None` where it has none or did not clip."""
    return clip_statistics(torch.tensor(norms, dtype=torch.float64), max_norm) if norms and max_norm else None


def _measure_lane(lane: Lane, lag: LagMatrix, agreement: Tensor, split: PathSplit | None, lags: int) -> LaneReport:
    curve = lag.curve[lag.lags >= 0]
    has_keeping_gate = lane.cell.name.split("+")[0] in KEEPING
    norm, radius = _step_size(lane)
    return LaneReport(
        name=lane.name,
        lag=lag,
        horizons=[horizon(lag, epsilon) for epsilon in EPSILONS],
        decay=tail_decay(curve),
        truncation=[truncation_length(curve, bias) for bias in BIASES],
        agreement=agreement.nanmedian().item(),
        exponents=_exponents(lane),
        norm=norm,
        radius=radius,
        bound=pascanu_bound(lane) if lane.cell.name in ("rnn_tanh", "rnn_relu") else None,
        gates=gate_use(lane),
        constants=_quantiles(time_constants(lane)) if has_keeping_gate else None,
        carousel=carousel(lane, lags).tolist() if has_keeping_gate else None,
        split=split,
    )


def _exponents(lane: Lane) -> list[float]:
    if lane.begins is not None or lane.active is not None:
        return []
    count = min(EXPONENTS, sum(lane.widths))
    return lyapunov_spectrum(lane, count, skip=min(50, lane.steps // 4)).mean(0).tolist()


def _step_size(lane: Lane) -> tuple[float, float]:
    """Return norm and spectral radius, means over four steps of the first row."""
    if sum(lane.widths) > LARGEST_DECOMPOSED:
        return math.nan, math.nan
    steps = sorted({lane.steps * i // 4 for i in range(1, 4)} | {lane.steps - 1})
    size = step_size(lane.row(0), steps)
    return size.norm.mean().item(), size.radius.mean().item()


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    ordered = values.sort().values.tolist()
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _lane_record(lane: LaneReport) -> dict[str, Any]:
    return {
        "name": lane.name,
        "curve": lane.curve,
        "horizons": [h._asdict() for h in lane.horizons],
        "decay_per_step": lane.decay,
        "truncation_lengths": [{"bias": b, "steps": k} for b, k in zip(BIASES, lane.truncation, strict=True)],
        "cancellation": lane.agreement,
        "lyapunov_exponents": lane.exponents,
        "jacobian_norm": lane.norm,
        "jacobian_spectral_radius": lane.radius,
        "bound": None if lane.bound is None else lane.bound._asdict(),
        "gates": [gate._asdict() for gate in lane.gates],
        "time_constants": lane.constants,
        "carousel": lane.carousel,
        "paths": None if lane.split is None else {name: part.tolist() for name, part in lane.split._asdict().items()},
    }
