"""`throughtime gradients`: measure a run or a fresh cell, print the report on one screen, write it as JSON and as a figure."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from throughtime.app.terminal import number
from throughtime.errors import InputError

if TYPE_CHECKING:
    from throughtime.insight.clipping import ClipStatistics
    from throughtime.insight.gradient_flow import Horizon
    from throughtime.insight.recording import ModelRecording
    from throughtime.insight.report import GradientReport, LaneReport, Trial

    Fresh = Callable[[str, str], ModelRecording]

PLOT_ROWS, PLOT_COLUMNS, LOWEST_DECADE = 8, 60, -6
NAME_WIDTH = 10


@dataclass(frozen=True)
class Subject:
    """What to measure.

    Attributes:
        run: The folder of a run, or `None` for a fresh cell.
        cell: Cell of the fresh network.
        hidden: Its width.
        layers: Its depth.
        init: Its initialisation.
        text: A text to read; `None` takes a run's held-out text, or white noise.
        lags: Over how many steps each loss is followed.
        probe: How many losses are followed.
        seed: Draws the fresh weights and the noise.
    """

    run: Path | None
    cell: str
    hidden: int
    layers: int
    init: str
    text: Path | None
    lags: int
    probe: int
    seed: int

    @property
    def steps(self) -> int:
        """T: every loss that is followed has the whole window before it."""
        return self.lags + self.probe - 1


def measure_subject(subject: Subject) -> "GradientReport":
    """Measure a run, or a fresh cell, and other ways to start it."""
    from throughtime.insight.report import GradientReport, measure, starts_to_try, try_starts

    for flag, value in (("--lags", subject.lags), ("--probe", subject.probe)):
        if value < 1:
            raise InputError(f"{flag} {value}: expected a whole number, at least 1")
    described, source, recorded, cell, fresh, clip = _of_run(subject) if subject.run else _of_cell(subject)
    lanes = measure(recorded, lags=subject.lags, probes=subject.probe)
    trials = try_starts(fresh, starts_to_try(cell, subject.lags), subject.lags)
    steps, rows, _ = recorded.recording.outputs.shape
    probed = len(lanes[-1].lag.losses)
    return GradientReport(described, source, cell, steps, rows, probed, subject.lags, lanes, trials, clip)


def print_report(report: "GradientReport", console: Console) -> None:
    """Print a report, as far as it goes on one screen."""
    console.print(Text(f"{report.subject} · {report.source}", "bold"), soft_wrap=True)
    colour = {"healthy": "bold green"}.get(report.verdict.kind, "bold red")
    console.print(Text(report.verdict.sentence, colour), soft_wrap=True)
    console.print(
        f"\ngradient left of a loss at lag k (its {report.top.name}, {report.losses} losses × {report.rows} rows)"
    )
    for line in plot(report.top.curve, _direct_curve(report.top)):
        console.print(line, soft_wrap=True)
    console.print()
    for line in _figures(report):
        console.print(line, soft_wrap=True)


def write_report(report: "GradientReport", folder: Path) -> list[str]:
    """Write gradients.json and gradients.png; return what to say about them."""
    from throughtime.insight.plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n"
    (folder / "gradients.json").write_text(text, encoding="utf-8")
    try:
        draw(report, folder / "gradients.png")
    except InputError as error:
        return [f"wrote {folder / 'gradients.json'}", str(error)]
    return [f"wrote {folder / 'gradients.json'} and {folder / 'gradients.png'}"]


def plot(curve: Sequence[float], beside: Sequence[float] = ()) -> list[str]:
    r"""Return a curve as text, logarithmic, as far as it is worth drawing: `•` is the curve, `·` another beside it.

    Example:
        >>> print("\n".join(line.rstrip() for line in plot([10.0**-k for k in range(4)])))
          1e+00 ┤•
                │
                │ •
                │
                │
                │  •
                │
          1e-03 ┤   •
                └────
                 0    lag 3
    """
    seen = next((k for k, v in enumerate(curve) if _decade(v) < LOWEST_DECADE), len(curve) - 1) + 1
    curve, beside = [_decade(v) for v in curve[:seen]], [_decade(v) for v in beside[:seen]]
    top = max(math.ceil(max(curve) - 1e-9), 0)
    bottom = max(math.floor(min(curve)), LOWEST_DECADE) if min(curve) < top else top - 1
    columns = min(PLOT_COLUMNS, len(curve))
    grid = [[" "] * columns for _ in range(PLOT_ROWS)]
    for mark, values in (("·", beside), ("•", curve)):
        for column in range(columns if values else 0):
            value = values[round(column * (len(curve) - 1) / max(1, columns - 1))]
            row = round((top - value) / (top - bottom) * (PLOT_ROWS - 1))
            if 0 <= row < PLOT_ROWS:
                grid[row][column] = mark
    labels = {0: f"1e{top:+03d} ┤", PLOT_ROWS - 1: f"1e{bottom:+03d} ┤"}
    lines = [f"{labels.get(row, '│'):>9}{''.join(cells)}" for row, cells in enumerate(grid)]
    end = f"lag {len(curve) - 1}"
    return [*lines, f"{'└':>9}{'─' * columns}", f"{'0':>10}{end:>{max(columns - 1, len(end) + 4)}}"]


def _figures(report: "GradientReport") -> list[str]:
    """Return the facts below the plot, a line each."""
    lines = []
    for lane in reversed(report.lanes):
        reach = "  ".join(
            f"{'½' if h.epsilon == 0.5 else f'1/{1 / h.epsilon:.0f}'} {_reach(h, report.lags)}" for h in lane.horizons
        )
        decay = "" if math.isnan(lane.decay) else f"  ×{lane.decay:.2g} a step"
        lines.append(_line("horizon" if len(report.lanes) == 1 else lane.name, f"{reach}{decay}"))
    top = report.top
    shares = zip(("10 %", "1 %"), top.truncation, strict=True)
    lengths = ", ".join(
        f"{share} at {f'more than {report.lags}' if k == math.inf else f'{k:.0f}'}" for share, k in shares
    )
    lines.append(_line("truncation", f"of the gradient's mass BPTT loses {lengths} steps"))
    lines.append(_line("agreement", f"κ {top.agreement:.2f}: 1 where all losses pull a state the same way"))
    lines.append(_line("step", _step(top)))
    if top.gates:
        opened = ", ".join(f"{g.name} {g.mean:.2f} [{100 * g.closed:.0f}|{100 * g.open:.0f}]" for g in top.gates)
        lines.append(_line("gates", f"{opened}  [% <0.1|>0.9]"))
    if top.constants is not None:
        low, middle, high = top.constants
        lines.append(_line("memory", f"time constants {low:.3g} to {high:.3g} steps, median {middle:.3g}"))
    if top.split is not None and top.constants is not None:
        lines.append(_line("paths", _paths(report)))
    if report.clip is not None:
        clip = report.clip
        found = f"{clip.share:.0%} of logged steps, by ×{clip.scale:.2g}; norm before: median {clip.median:.3g}"
        lines.append(_line("clipping", f"{found}, largest {clip.largest:.3g}"))
    for index, trial in enumerate(report.trials):
        lines.append(_line("" if index else "try", _advice(trial, report) + ("" if index else "  (measured, fresh)")))
    return lines


def _step(lane: "LaneReport") -> str:
    parts = []
    if lane.exponents:
        parts.append("Lyapunov " + ", ".join(number(value, 2) for value in lane.exponents[:3]) + " nats")
    if not math.isnan(lane.norm):
        parts.append(f"‖J‖ {lane.norm:.2f}, radius {lane.radius:.2f}")
    if lane.bound is not None:
        parts.append(f"γσ_max(W_hh) {lane.bound.bound:.2f}")
    return "; ".join(parts)


def _paths(report: "GradientReport") -> str:
    """Say at one lag what the additive path alone carries: where the gradient is gone, or at the window's end."""
    lane, split = report.top, report.top.split
    assert split is not None
    lag = int(min(lane.horizons[-1].lag, len(split.total) - 1))
    whole = split.total[lag].item() or math.nan
    direct, gates = split.direct[lag].item() / whole, split.gates[lag].item() / whole
    return f"at lag {lag}, additive path alone ×{direct:.2f} of the norm, through W_hh ×{gates:.2f}"


def _advice(trial: "Trial", report: "GradientReport") -> str:
    """Say what another start was measured to do."""
    name = f"--cell {trial.cell} " * (trial.cell != report.cell) + f"--init {trial.init}"
    if trial.horizon.lag == math.inf:
        return f"{name:28} ×{trial.at_last_lag:.2g} left at lag {report.lags - 1}"
    return f"{name:28} 1/1000 {_reach(trial.horizon, report.lags)}"


def _reach(reach: "Horizon", lags: int) -> str:
    from throughtime.insight.report import interval

    if reach.lag == math.inf:
        return f"beyond {lags - 1}"
    return f"at {reach.lag:.0f} {interval(reach)}"


def _line(name: str, text: str) -> str:
    return f"{name:{NAME_WIDTH}} {text}"


def _direct_curve(lane: "LaneReport") -> list[float]:
    if lane.split is None or lane.constants is None:
        return []
    return (lane.split.direct / lane.split.total[0]).tolist()


def _decade(value: float) -> float:
    return math.log10(value) if value > 1e-30 else -30.0


def _of_cell(subject: Subject) -> tuple[str, str, "ModelRecording", str, "Fresh", None]:
    """Return what is measured of a fresh cell, and how to make another."""
    import torch

    from throughtime.insight.report import make_layer, record_noise

    def fresh(cell: str, names: str) -> "ModelRecording":
        torch.manual_seed(subject.seed)
        return record_noise(make_layer(cell, subject.hidden, subject.layers, names), subject.steps, subject.seed)

    described = _described(subject.cell, subject.layers, subject.hidden, f"fresh, init {subject.init}")
    if subject.text is None:
        return described, "on white noise", fresh(subject.cell, subject.init), subject.cell, fresh, None
    tokens, reads = _read_bytes(subject.text), f"on the bytes of {subject.text}"
    fresh_model = _fresh_model(subject, 256, tokens)
    return described, reads, fresh_model(subject.cell, subject.init), subject.cell, fresh_model, None


def _of_run(subject: Subject) -> tuple[str, str, "ModelRecording", str, "Fresh", "ClipStatistics | None"]:
    """Return what is measured of a run, and how to make a fresh model of its shape."""
    from throughtime.insight.report import clip_report, record_text
    from throughtime.lm.corpus import read_tokens
    from throughtime.lm.run import open_run

    assert subject.run is not None
    run = open_run(subject.run)
    config = run.model_config
    if config.cell == "mlp":
        raise InputError(
            f"{subject.run}: an mlp sees a fixed window and carries no state; expected a run of another cell"
        )
    if subject.text is None:
        tokens, reads = run.corpus().held_out, "on its held-out text"
    else:
        tokens, reads = read_tokens(subject.text, run.tokenizer), f"on {subject.text}"
    recorded = record_text(run.load_model("cpu"), tokens, subject.steps)
    norms = [line["gradient_norm"] for line in run.metrics() if line.get("gradient_norm") is not None]
    described = _described(config.cell, config.num_layers, config.hidden_size, f"trained, {subject.run}")
    clip = clip_report(norms, run.options.get("clip") or 0.0)
    fresh = _fresh_model(subject, config.vocabulary_size, tokens, config)
    return described, reads, recorded, config.cell, fresh, clip


def _fresh_model(subject: Subject, vocabulary_size: int, tokens: object, config: object = None) -> "Fresh":
    from dataclasses import replace

    import torch

    from throughtime.insight.report import initialise_model_, record_text
    from throughtime.lm.model import LanguageModel, ModelConfig

    shape = config or ModelConfig(vocabulary_size, subject.cell, subject.hidden, subject.layers)

    def fresh(cell: str, names: str) -> "ModelRecording":
        torch.manual_seed(subject.seed)
        model = initialise_model_(LanguageModel(replace(shape, cell=cell)), names)  # type: ignore[type-var]
        return record_text(model, tokens, subject.steps)  # type: ignore[arg-type]

    return fresh


def _read_bytes(path: Path) -> object:
    from throughtime.lm.corpus import read_tokens
    from throughtime.lm.tokenizer import ByteTokenizer

    return read_tokens(path, ByteTokenizer())


def _described(cell: str, layers: int, hidden: int, rest: str) -> str:
    return f"{cell.upper().replace('_', ' ')}, {layers} layer{'s' if layers > 1 else ''} of {hidden}, {rest}"
