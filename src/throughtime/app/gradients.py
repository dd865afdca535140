"""`throughtime gradients`: measure a run or a fresh cell, print the report on one screen, write it as JSON, figure and page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from throughtime.app.terminal import number, under_way, visible
from throughtime.errors import InputError
from throughtime.plain import printable, to_json

if TYPE_CHECKING:
    from throughtime.insight.clipping import ClipStatistics
    from throughtime.insight.gradient_flow import Horizon
    from throughtime.insight.recording import ModelRecording
    from throughtime.insight.report import GradientReport, LaneReport, Trial
    from throughtime.lm.tokenizer import Tokenizer

    Fresh = Callable[[str, str], ModelRecording]

PLOT_ROWS, PLOT_COLUMNS, LOWEST_DECADE = 8, 60, -6
NAME_WIDTH = 10


@dataclass(frozen=True)
class Subject:
    """What to measure: a run, or a fresh cell.

    Attributes:
        run: The folder of a run, or `None` for a fresh cell.
        cell: Cell of the fresh network, or `None` for a run.
        hidden: Its width; 64 if not given.
        layers: Its depth; 1 if not given.
        init: Its initialisation; "default" if not given.
        text: A text to read; `None` takes a run's held-out text, or white noise.
        lags: Over how many steps each loss is followed.
        probe: How many losses are followed.
        seed: Draws the fresh weights and the noise.

    Raises:
        InputError: Neither a run nor a cell is given, or both; or a run and a size, which it has already; or a count below 1.
    """

    run: Path | None = None
    cell: str | None = None
    hidden: int | None = None
    layers: int | None = None
    init: str | None = None
    text: Path | None = None
    lags: int = 200
    probe: int = 64
    seed: int = 1

    def __post_init__(self) -> None:
        if (self.run is None) == (self.cell is None):
            raise InputError(
                "expected either RUN or --cell NAME, such as: throughtime gradients --cell lstm --hidden 64"
            )
        for flag in ("hidden", "layers", "init"):
            if self.run is not None and getattr(self, flag) is not None:
                raise InputError(
                    f"--{flag} {getattr(self, flag)}: {self.run} has its own; expected it with --cell only, for a fresh network"
                )
        for flag, value in (
            ("--lags", self.lags),
            ("--probe", self.probe),
            ("--hidden", self.hidden),
            ("--layers", self.layers),
        ):
            if value is not None and value < 1:
                raise InputError(f"{flag} {value}: expected a whole number, at least 1")

    @property
    def steps(self) -> int:
        """T: every loss that is followed has the whole window before it."""
        return self.lags + self.probe - 1


def check_size(subject: Subject, hidden: int, layers: int) -> None:
    """Refuse what can't be recorded in the memory there is.

    Raises:
        InputError: With what is needed, and what to lower.
    """
    from throughtime.insight.report import ROWS
    from throughtime.lm.memory import check_free

    weights, activity = 4 * hidden * (2 * hidden + 2), subject.steps * ROWS * 12 * hidden
    check_free(
        4 * layers * (weights + activity),
        f"{layers} {'layers' if layers > 1 else 'layer'} of {hidden} over --lags {subject.lags} and --probe {subject.probe}",
        "--lags or --probe" if subject.run else "--hidden, --layers, --lags or --probe",
    )


@dataclass(frozen=True)
class Found:
    """What a subject turned out to be, read once and recorded.

    Attributes:
        described: What it is, in a line.
        source: What it read, in a line.
        cell: Its cell.
        recorded: The forward pass and the losses' gradients.
        fresh: Makes and records a network of its shape, of a cell and an initialisation.
        clip: What clipping met while it was trained.
        texts: What its first sequence read at each step, and one more, what is predicted last; `None` where that was noise.
    """

    described: str
    source: str
    cell: str
    recorded: "ModelRecording"
    fresh: "Fresh"
    clip: "ClipStatistics | None" = None
    texts: list[str] | None = None


def find_subject(subject: Subject) -> Found:
    """Read what is to be measured and record it."""
    return _of_run(subject) if subject.run else _of_cell(subject)


def measure_subject(subject: Subject, found: Found, with_trials: bool = True) -> "GradientReport":
    """Measure what was found, and, unless `with_trials` is false, other ways to start it."""
    from throughtime.insight.report import GradientReport, measure, starts_to_try, try_starts

    starts = starts_to_try(found.cell, subject.lags) if with_trials else []
    trials = []
    with under_way("measuring how far gradients reach, and what carries them") as show:
        lanes = measure(found.recorded, lags=subject.lags, probes=subject.probe)
        for number, (cell, names) in enumerate(starts, 1):
            show(f"trying {cell} with --init {names}, {number} of {len(starts)}")
            trials += try_starts(found.fresh, [(cell, names)], subject.lags)
    steps, rows, _ = found.recorded.recording.outputs.shape
    probed = len(lanes[-1].lag.losses)
    return GradientReport(
        found.described, found.source, found.cell, steps, rows, probed, subject.lags, lanes, trials, found.clip
    )


def print_report(report: "GradientReport", console: Console) -> None:
    """Print a report, as far as it goes on one screen."""
    console.print(Text(printable(f"{report.subject} · {report.source}"), "bold"), soft_wrap=True)
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


def write_report(report: "GradientReport", found: Found, folder: Path) -> list[str]:
    """Write gradients.json, gradients.html and gradients.png; return what to say about them.

    Raises:
        InputError: The folder can't be written.
    """
    from throughtime.app import pages
    from throughtime.insight.page_data import matrix_data, reading_data
    from throughtime.insight.plots import draw

    names = ["gradients.json", "gradients.html"]
    record = report.to_json()
    reading = reading_data(found.recorded, found.texts, report.lags)
    data = {"report": record, "matrix": matrix_data(report), "reading": reading}
    pages.write(folder / "gradients.html", "gradients", f"throughtime gradients: {report.verdict.kind}", data)
    text = to_json(record, indent=1) + "\n"
    (folder / "gradients.json").write_text(text, encoding="utf-8")
    try:
        draw(report, folder / "gradients.png")
    except InputError as error:
        return [f"wrote {' and '.join(names)} to {folder}", str(error)]
    return [f"wrote {', '.join(names)} and gradients.png to {folder}"]


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
    seen = _seen(curve)
    return overlay([("·", beside[:seen]), ("•", curve[:seen])])


def overlay(curves: Sequence[tuple[str, Sequence[float]]]) -> list[str]:
    r"""Return curves as text over each other, each drawn with its mark, later ones on top, as far as any is worth drawing.

    Example:
        >>> print("\n".join(line.rstrip() for line in overlay([("a", [1.0] * 4), ("b", [10.0**-k for k in range(4)])])))
          1e+00 ┤baaa
                │
                │ b
                │
                │
                │  b
                │
          1e-03 ┤   b
                └────
                 0    lag 3
    """
    length = max(_seen(curve) for _, curve in curves)
    marked = [(mark, [_decade(v) for v in curve[:length]]) for mark, curve in curves if len(curve)]
    lowest = min(min(values) for _, values in marked)
    top = max(0, *(math.ceil(max(values) - 1e-9) for _, values in marked))
    bottom = max(math.floor(lowest), LOWEST_DECADE) if lowest < top else top - 1
    columns = min(PLOT_COLUMNS, length)
    grid = [[" "] * columns for _ in range(PLOT_ROWS)]
    for mark, values in marked:
        for column in range(columns):
            at = round(column * (length - 1) / max(1, columns - 1))
            row = round((top - values[at]) / (top - bottom) * (PLOT_ROWS - 1)) if at < len(values) else PLOT_ROWS
            if 0 <= row < PLOT_ROWS:
                grid[row][column] = mark
    labels = {0: f"1e{top:+03d} ┤", PLOT_ROWS - 1: f"1e{bottom:+03d} ┤"}
    lines = [f"{labels.get(row, '│'):>9}{''.join(cells)}" for row, cells in enumerate(grid)]
    end = f"lag {length - 1}"
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
    for index, trial in enumerate(report.advice):
        lines.append(_line("" if index else "try", _advice(trial, report) + ("" if index else "  (measured, fresh)")))
    if report.trials and not report.advice:
        tried = ", ".join(f"--init {trial.init}" for trial in report.trials)
        lines.append(_line("try", f"nothing: none of {tried} reaches further"))
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


def _seen(curve: Sequence[float]) -> int:
    """Return how many values of a curve there are down to the first that lies below what is drawn."""
    return next((k for k, v in enumerate(curve) if _decade(v) < LOWEST_DECADE), len(curve) - 1) + 1


def _decade(value: float) -> float:
    return math.log10(value) if value > 1e-30 else -30.0


def _of_cell(subject: Subject) -> Found:
    """Return what is measured of a fresh cell, and how to make another."""
    import torch

    from throughtime.insight.report import make_layer, record_noise
    from throughtime.lm.tokenizer import ByteTokenizer

    assert subject.cell is not None
    cell, init = subject.cell, subject.init or "default"
    hidden, layers = (
        default if value is None else value for value, default in ((subject.hidden, 64), (subject.layers, 1))
    )
    check_size(subject, hidden, layers)

    def fresh(cell: str, names: str) -> "ModelRecording":
        torch.manual_seed(subject.seed)
        return record_noise(make_layer(cell, hidden, layers, names), subject.steps, subject.seed)

    described = _described(cell, layers, hidden, f"fresh, init {init}")
    if subject.text is None:
        return Found(described, "on white noise", cell, fresh(cell, init), fresh)
    tokenizer = ByteTokenizer()
    tokens = _read(subject.text, tokenizer)
    fresh_model = _fresh_model(subject, tokens, (256, cell, hidden, layers))
    texts = _texts(tokens, tokenizer, subject.steps)
    return Found(described, f"on the bytes of {subject.text}", cell, fresh_model(cell, init), fresh_model, texts=texts)


def _of_run(subject: Subject) -> Found:
    """Return what is measured of a run, and how to make a fresh model of its shape."""
    from throughtime.insight.report import clip_report, record_text
    from throughtime.lm.run import open_run

    assert subject.run is not None
    run = open_run(subject.run)
    config = run.model_config
    if config.cell == "mlp":
        raise InputError(
            f"{subject.run}: an mlp sees a fixed window and carries no state; expected a run of another cell"
        )
    if subject.text is None and run.config.packed is not None:
        raise InputError(f"{subject.run}: was packed to be shared, without its text; give it one to read: --text FILE")
    if subject.text is None:
        tokens, reads = run.corpus().held_out, "on its held-out text"
    else:
        tokens, reads = _read(subject.text, run.tokenizer), f"on {subject.text}"
    if len(tokens) > subject.steps:  # else it is refused for that
        check_size(subject, config.hidden_size, config.num_layers)
    recorded = record_text(run.load_model("cpu"), tokens, subject.steps)
    norms = [line["gradient_norm"] for line in run.metrics() if line.get("gradient_norm") is not None]
    described = _described(config.cell, config.num_layers, config.hidden_size, f"trained, {subject.run}")
    clip = clip_report(norms, run.options.get("clip") or 0.0)
    texts = _texts(tokens, run.tokenizer, subject.steps)
    return Found(described, reads, config.cell, recorded, _fresh_model(subject, tokens, config), clip, texts)


def _fresh_model(subject: Subject, tokens: Any, shape: Any) -> "Fresh":
    """Return how to make a fresh language model of a shape, a ModelConfig or its first fields, and record it on tokens."""
    from dataclasses import replace

    import torch

    from throughtime.init import initialise_model_
    from throughtime.insight.report import record_text
    from throughtime.lm.model import LanguageModel, ModelConfig

    def fresh(cell: str, names: str) -> "ModelRecording":
        torch.manual_seed(subject.seed)
        config = ModelConfig(*shape) if isinstance(shape, tuple) else shape
        model = initialise_model_(LanguageModel(replace(config, cell=cell)), names)
        return record_text(model, tokens, subject.steps)

    return fresh


def _read(path: Path, tokenizer: "Tokenizer") -> Any:
    from throughtime.lm.corpus import read_tokens

    return read_tokens(path, tokenizer)


def _texts(tokens: Any, tokenizer: "Tokenizer", steps: int) -> list[str]:
    """Return what the first `steps` + 1 tokens say, each by itself and every character of it visible."""
    decoder = tokenizer.decoder()
    return [visible(decoder.push(int(token))) for token in tokens[: steps + 1]]


def _described(cell: str, layers: int, hidden: int, rest: str) -> str:
    return f"{cell.upper().replace('_', ' ')}, {layers} layer{'s' if layers > 1 else ''} of {hidden}, {rest}"
