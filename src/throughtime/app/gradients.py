"""`throughtime gradients`: measure a run or a fresh cell, print the report on one screen, write it as JSON, figure and page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.text import Text

from throughtime.app.counts import check_counts
from throughtime.app.terminal import Show, number, under_way, visible
from throughtime.errors import InputError
from throughtime.plain import printable, to_json

if TYPE_CHECKING:
    import torch

    from throughtime.insight.gradient_flow import Horizon
    from throughtime.insight.recording import ModelRecording
    from throughtime.insight.report import ClipReport, GradientReport, LaneReport, Recorder, Trial
    from throughtime.insight.verdict import Need
    from throughtime.lm.run import Run
    from throughtime.lm.tokenizer import Tokenizer

    Fresh = Callable[[str, str, "Window"], Recorder]

COPIES_OF_NORMS = 6  # of how much of a loss is left at a lag in a row, while its report is made
PLOT_ROWS, PLOT_COLUMNS, LOWEST_DECADE = 8, 60, -6
NAME_WIDTH = 10
FEW = 8  # rows below which an interval is often several times as wide as with 16
FIRST_WORD = 2.0  # seconds after which it is said what is being measured


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
        lags: Over how many steps each loss is followed; `None` is 200, or what is needed if that is more.
        probe: How many losses are followed.
        within: Over how many steps gradients have to reach; `None` is what a run was trained over, its --bptt, or 200.
        seed: Draws the fresh weights and the noise.
        seeds: How many fresh networks are measured, of `seed` and the numbers after it.

    Raises:
        InputError: Neither a run nor a cell is given, or both; or a run and a size, which it has already; or a count can't be.
    """

    run: Path | None = None
    cell: str | None = None
    hidden: int | None = None
    layers: int | None = None
    init: str | None = None
    text: Path | None = None
    lags: int | None = None
    probe: int = 16
    within: int | None = None
    seed: int = 1
    seeds: int | None = None

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
        check_counts(
            lags=self.lags,
            probe=self.probe,
            within=self.within,
            seeds=self.seeds,
            hidden=self.hidden,
            layers=self.layers,
        )

    def followed(self, need: "Need") -> int:
        """Return K, over how many steps each loss is followed where `need` steps are needed."""
        from throughtime.insight.report import LAGS

        return max(LAGS, need.steps) if self.lags is None else self.lags


def check_size(subject: Subject, lags: int, hidden: int, layers: int) -> None:
    """Refuse what can't be recorded in the memory there is.

    Raises:
        InputError: With what is needed, and what to lower.
    """
    from throughtime.insight.report import ROWS
    from throughtime.lm.memory import check_free

    weights, activity = 4 * hidden * (2 * hidden + 2), (lags + subject.probe) * ROWS * 12 * hidden
    norms = COPIES_OF_NORMS * lags * subject.probe * ROWS
    check_free(
        4 * layers * (weights + activity + norms),
        f"{layers} {'layers' if layers > 1 else 'layer'} of {hidden} over --lags {lags} and --probe {subject.probe}",
        "--lags or --probe" if subject.run else "--hidden, --layers, --lags or --probe",
    )


class Window(NamedTuple):
    """What to record.

    Attributes:
        lags: Over how many lags losses are followed.
        probes: How many losses are.
        rows: In how many sequences side by side.
        seed: Draws a fresh network.
    """

    lags: int
    probes: int
    rows: int
    seed: int

    @property
    def steps(self) -> int:
        """T: every loss that is followed has the whole window before it."""
        return self.lags + self.probes - 1


@dataclass(frozen=True)
class Found:
    """What a subject turned out to be.

    Attributes:
        described: What it is, in a line.
        source: What it reads, in a line.
        cell: Its cell.
        need: Over how many steps its gradients have to reach.
        lags: Over how many each loss is followed.
        window: The steps of BPTT that it was trained with, or would be.
        on_noise: Whether its losses are random directions.
        record: Records it, in a dtype.
        fresh: Makes and records a network of its shape, of a cell and an initialisation, in a dtype.
        init: How it was started, where that can be done again.
        clip: What clipping met while it was trained.
        texts: What its first sequence reads at each step, and one more, what is predicted last; `None` where that is noise.
    """

    described: str
    source: str
    cell: str
    need: "Need"
    lags: int
    window: int
    on_noise: bool
    record: "Recorder"
    fresh: "Fresh"
    init: str | None
    clip: "ClipReport | None" = None
    texts: list[str] | None = None


class Measurement(NamedTuple):
    """A report, and the recording that it was made from."""

    report: "GradientReport"
    recorded: "ModelRecording"


def find_subject(subject: Subject) -> Found:
    """Read what is to be measured."""
    return _of_run(subject) if subject.run else _of_cell(subject)


def measure_subject(subject: Subject, found: Found, with_trials: bool = True) -> Measurement:
    """Record and measure what was found, and, unless `with_trials` is false, other ways to start it."""
    from throughtime.insight.report import GradientReport, measure_finite, starts_to_try

    starts = starts_to_try(found.cell, found.lags) if with_trials else []
    with under_way("measuring how far gradients reach, and what carries them", first=FIRST_WORD) as show:
        options = {"window": found.window, "agreement": not found.on_noise}
        measured = measure_finite(found.record, lags=found.lags, probes=subject.probe, tell=show, **options)
        recorded, lanes, overflow = measured
        fresh = _fresh_start(subject, found, with_trials, show)
        trials = [_try(subject, found, cell, names, show) for cell, names in starts]
    steps, rows, _ = recorded.recording.outputs.shape
    report = GradientReport(
        found.described,
        found.source,
        found.cell,
        steps,
        rows,
        len(lanes[-1].lag.losses),
        found.lags,
        lanes,
        trials,
        fresh,
        found.need,
        overflow,
        str(recorded.recording.outputs.dtype).removeprefix("torch."),
        subject.run is not None,
        found.clip,
    )
    return Measurement(report, recorded)


def _fresh_start(subject: Subject, found: Found, with_trials: bool, show: Show) -> "Trial | None":
    """Measure fresh networks started as a run was, or as a cell was where several seeds are asked for."""
    wants = with_trials if subject.run else (subject.seeds or 1) > 1
    return _try(subject, found, found.cell, found.init, show) if wants and found.init is not None else None


def _try(subject: Subject, found: Found, cell: str, names: str, show: Show) -> "Trial":
    from throughtime.insight.report import TRIAL_PROBES, TRIAL_ROWS, TRIAL_SEEDS, try_start

    recorders = []
    for seed in range(subject.seed, subject.seed + (subject.seeds or TRIAL_SEEDS)):
        window = Window(found.lags, TRIAL_PROBES, TRIAL_ROWS, seed)
        recorders.append(found.fresh(cell, names, window))
    show(f"measuring fresh networks: {cell}, --init {names}")
    return try_start(recorders, cell, names, found.lags, found.need)


def print_report(report: "GradientReport", console: Console) -> None:
    """Print a report, as far as it goes on one screen."""
    console.print(Text(printable(f"{report.subject} · {report.source}"), "bold"), soft_wrap=True)
    colour = {"healthy": "bold green", "undecided": "bold yellow"}.get(report.verdict.kind, "bold red")
    console.print(Text(report.verdict.sentence, colour), soft_wrap=True)
    state = f"({report.top.parts}), in one norm," if "," in report.top.parts else report.top.parts
    losses = f"{report.losses} loss{'es' * (report.losses != 1)}"
    rows = f"{report.rows} row{'s' * (report.rows != 1)}"
    console.print(f"\ngradient of {state} left at lag k ({report.top.name}, {losses} × {rows})")
    for line in plot(report.top.curve, _direct_curve(report.top)):
        console.print(line, soft_wrap=True)
    console.print()
    for line in _figures(report):
        console.print(line, soft_wrap=True)


def write_report(measurement: Measurement, texts: Sequence[str] | None, folder: Path) -> list[str]:
    """Write gradients.json, gradients.html and gradients.png; return what to say about them; `texts` as in `Found`.

    Raises:
        InputError: The folder can't be written.
    """
    from throughtime.app import pages
    from throughtime.insight.page_data import matrix_data, reading_data
    from throughtime.insight.plots import draw

    report, recorded = measurement
    names = ["gradients.json", "gradients.html"]
    record = report.to_json()
    reading = reading_data(recorded, texts, report.lags)
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
    top = report.top
    lines = []
    for lane in reversed(report.lanes):
        reach = "  ".join(
            f"{'½' if h.epsilon == 0.5 else f'1/{1 / h.epsilon:.0f}'} {_reach(h, report.lags)}" for h in lane.horizons
        )
        decay = "" if math.isnan(lane.decay) else f"  ×{lane.decay:.2g} a step"
        lines.append(_line("horizon" if len(report.lanes) == 1 else lane.name, f"{reach}{decay}"))
    lines += [_line("", told) for told in _rows(report.rows)]
    lines.append(_line("losses", _spread(report)))
    if report.fresh is not None:
        lines.append(_line("own start" if report.is_trained else "seeds", seeds_told(report.fresh, report.lags)))
    lines.append(_line("truncation", _truncation(top, report.lags)))
    if not math.isnan(top.agreement):
        over = f"κ {top.agreement:.2f} over {top.agreement_steps} steps"
        lines.append(_line("agreement", f"{over}: 1 where losses pull a state the same way"))
    lines += [_line("" if index else "step", part) for index, part in enumerate(_step(top))]
    if top.gates:
        opened = ", ".join(f"{g.name} {g.mean:.2f} [{100 * g.closed:.0f}|{100 * g.open:.0f}]" for g in top.gates)
        lines.append(_line("gates", f"{opened} [% <.1|>.9]"))
    if top.constants is not None:
        low, middle, high = top.constants
        lines.append(_line("memory", f"time constants {low:.3g} to {high:.3g} steps, median {middle:.3g}"))
    if top.split is not None:
        lines.append(_line("paths", _paths(report)))
    if report.clip is not None:
        lines += [_line("" if index else "clipping", part) for index, part in enumerate(_clipping(report.clip))]
    return lines + _tries(report)


def _rows(rows: int) -> list[str]:
    """Say what intervals are over, and what few rows mean."""
    if rows == 1:
        return ["one row has no interval; more text, or a lower --lags, gives more"]
    whole = f"[a–b] is the 95 % interval over {rows} rows that the same weights read"
    return [whole] if rows >= FEW else [whole, "few rows make it wide; more text, or a lower --lags, gives more"]


def _spread(report: "GradientReport") -> str:
    """Say how losses and rows differ where the mean is a thousandth, or at the window's end."""
    top = report.top
    lag = int(min(top.horizons[-1].lag, len(top.curve) - 1))
    low, middle, high = top.quantiles[:, lag].tolist()
    return f"at lag {lag}: median {middle:.1g}, mean {top.curve[lag]:.1g}, 80 % in {low:.1g}–{high:.1g}"


def seeds_told(fresh: "Trial", lags: int) -> str:
    """Say what fresh networks do that were started alike, with other seeds."""
    counts = ", ".join(f"{kind} {fresh.kinds.count(kind)}" for kind in dict.fromkeys(fresh.kinds))
    return f"{_fresh_reach(fresh, lags)}, over {len(fresh.lags)} seeds: {counts}"


def _truncation(lane: "LaneReport", lags: int) -> str:
    if math.isnan(lane.bias):
        return f"what --bptt {lane.window} loses can't be told: nothing decays within {lags} lags"
    length = lane.truncation[0]
    enough = "what loses 10 % can't be told" if length == math.inf else f"--bptt {length:.0f} loses 10 %"
    return f"--bptt {lane.window} loses {_percent(lane.bias)} of the gradient's mass; {enough}"


def _step(lane: "LaneReport") -> list[str]:
    from throughtime.insight.report import LARGEST_DECOMPOSED

    parts, lines = [], []
    if lane.exponents and lane.exponent_range:
        low, high = (number(value, 3) for value in lane.exponent_range)
        first, *rest = (number(value, 3) for value in lane.exponents[:3])
        spread = f" ({low} to {high} over the rows)" * (lane.lag.norms.shape[2] > 1)
        lines.append(f"Lyapunov {first}{spread}" + "".join(f", {e}" for e in rest) + " nats")
    if math.isnan(lane.norm):
        parts.append(f"‖J‖ isn't taken of states wider than {LARGEST_DECOMPOSED}")
    else:
        parts.append(f"‖J‖ {lane.norm:.2f}, radius {lane.radius:.2f}")
    if lane.bound is not None:
        parts.append(f"γσ_max(W_hh) {lane.bound.bound:.2f}")
    return [*lines, "; ".join(parts)]


def _clipping(clip: "ClipReport") -> list[str]:
    return [
        f"{_percent(clip.share)} of {clip.steps:,} steps, by ×{clip.scale:.2g}",
        f"{clip.logged:,} logged norms before it: median {clip.median:.3g}, largest {clip.largest:.3g}",
    ]


def _tries(report: "GradientReport") -> list[str]:
    """Say which other starts reach further, or that none does."""
    lines = []
    for index, trial in enumerate(report.advice):
        name = f"--cell {trial.cell} " * (trial.cell != report.cell) + f"--init {trial.init}"
        seeds = "" if index else f"  ({len(trial.lags)} seeds)"
        lines.append(_line("" if index else "try fresh", f"{name:26} {_fresh_reach(trial, report.lags)}{seeds}"))
    if report.trials and not report.advice:
        tried = ", ".join(f"--init {trial.init}" for trial in report.trials)
        lines.append(_line("try", f"nothing: none of {tried} reaches further"))
    return lines


def _fresh_reach(trial: "Trial", lags: int) -> str:
    """Say where 1/1000 is left in fresh networks, or what is left at the last lag."""
    lag, low, high = trial.reach
    if lag == math.inf:
        return f"×{trial.at_last_lag:.2g} left at lag {lags - 1}"
    ends = "–".join(f"{edge:.0f}" if edge < math.inf else "beyond" for edge in (low, high))
    return f"1/1000 at {lag:.0f}" if low == high else f"1/1000 at {lag:.0f}, {ends}"


def _percent(share: float) -> str:
    """Return a share in per cent, small ones with two digits."""
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{share:.0%}".replace("%", " %")


def _paths(report: "GradientReport") -> str:
    """Say at one lag what the additive path alone carries: where the gradient is gone, or at the window's end."""
    lane, split = report.top, report.top.split
    assert split is not None
    lag = int(min(lane.horizons[-1].lag, len(split.total) - 1))
    whole = split.total[lag].item() or math.nan
    direct, gates = split.direct[lag].item() / whole, split.gates[lag].item() / whole
    return f"at lag {lag}, additive path alone ×{direct:.2f} of the norm, through W_hh ×{gates:.2f}"


def _reach(reach: "Horizon", lags: int) -> str:
    from throughtime.insight.verdict import interval

    if reach.lag == math.inf:
        return f"beyond {lags - 1}"
    return f"at {reach.lag:.0f}{interval(reach)}"


def _line(name: str, text: str) -> str:
    return f"{name:{NAME_WIDTH}} {text}"


def _direct_curve(lane: "LaneReport") -> list[float]:
    if lane.split is None:
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

    from throughtime.insight.report import ROWS, WINDOW, make_layer, record_noise
    from throughtime.insight.verdict import NEEDED, Need
    from throughtime.lm.tokenizer import ByteTokenizer

    assert subject.cell is not None
    cell, init = subject.cell, subject.init or "default"
    hidden, layers = (
        default if value is None else value for value, default in ((subject.hidden, 64), (subject.layers, 1))
    )
    need = Need(subject.within or NEEDED)
    lags = subject.followed(need)
    check_size(subject, lags, hidden, layers)
    make_layer(cell, hidden, layers, init)  # which refuses what can't be, before anything is measured
    whole = Window(lags, subject.probe, ROWS, subject.seed)

    def fresh_layer(cell: str, names: str, window: Window) -> "Recorder":
        def record(dtype: "torch.dtype") -> "ModelRecording":
            torch.manual_seed(window.seed)
            layer = make_layer(cell, hidden, layers, names)
            return record_noise(layer, window.steps, window.seed, rows=window.rows, dtype=dtype)

        return record

    fresh: Fresh = fresh_layer
    described, source, texts = _described(cell, layers, hidden, f"fresh, init {init}"), "on white noise", None
    if subject.text is not None:
        tokenizer = ByteTokenizer()
        tokens = _read(subject.text, tokenizer)
        fresh, source = _fresh_model(tokens, (256, cell, hidden, layers)), f"on the bytes of {subject.text}"
        texts = _texts(tokens, tokenizer, whole.steps)
    recorder = fresh(cell, init, whole)
    on_noise = subject.text is None
    return Found(described, source, cell, need, lags, WINDOW, on_noise, recorder, fresh, init, texts=texts)


def _of_run(subject: Subject) -> Found:
    """Return what is measured of a run, and how to make a fresh model of its shape."""
    from throughtime.insight.report import LAYERS, ROWS, record_text
    from throughtime.insight.verdict import Need
    from throughtime.lm.run import open_run

    assert subject.run is not None
    if str(subject.run) in LAYERS and not subject.run.exists():
        raise InputError(f"{subject.run}: no such run; for a fresh cell give --cell {subject.run}")
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
    window = trained_window(subject.run)
    need = Need(window, "its --bptt") if subject.within is None else Need(subject.within)
    whole = Window(subject.followed(need), subject.probe, ROWS, subject.seed)
    if len(tokens) > whole.steps:  # else it is refused for that
        check_size(subject, whole.lags, config.hidden_size, config.num_layers)

    def record(dtype: "torch.dtype") -> "ModelRecording":
        return record_text(run.load_model("cpu"), tokens, whole.steps, rows=ROWS, dtype=dtype)

    return Found(
        _described(config.cell, config.num_layers, config.hidden_size, f"trained, {subject.run}"),
        reads,
        config.cell,
        need,
        whole.lags,
        window,
        on_noise=False,
        record=record,
        fresh=_fresh_model(tokens, config),
        init=_own_start(run),
        clip=_clip_of(run),
        texts=_texts(tokens, run.tokenizer, whole.steps),
    )


def trained_window(run: Path) -> int:
    """Return the steps of BPTT that a run was trained with."""
    from throughtime.insight.report import WINDOW
    from throughtime.lm.run import open_run

    return open_run(run).options.get("bptt") or WINDOW


def _own_start(run: "Run") -> str | None:
    """Return how a run's recurrent layers were started; `None` where that was otherwise than `init` can say, or unknown."""
    options = run.options
    if options.get("from_weights") or options.get("init_range"):
        return None
    return options.get("init") or "default"


def _clip_of(run: "Run") -> "ClipReport | None":
    """Return what clipping met in training: how often over all its steps, and what the logged norms were."""
    from throughtime.insight.report import clip_report

    steps = [line for line in run.metrics() if line.get("gradient_norm") is not None]
    counted = (run.results or {}).get("training") or (steps[-1] if steps else {})
    share, total = counted.get("clip_share"), counted.get("steps", counted.get("step"))
    return clip_report([line["gradient_norm"] for line in steps], run.options.get("clip") or 0.0, share, total)


def _fresh_model(tokens: Any, shape: Any) -> "Fresh":
    """Return how to make a fresh language model of a shape, a ModelConfig or its first fields, and record it on tokens."""
    from copy import deepcopy
    from dataclasses import replace
    from functools import lru_cache

    import torch

    from throughtime.init import initialise_model_
    from throughtime.insight.report import TRIAL_SEEDS, record_text
    from throughtime.lm.model import LanguageModel, ModelConfig

    @lru_cache(maxsize=TRIAL_SEEDS)  # starts differ in what they do to the same draw
    def drawn(cell: str, seed: int) -> "tuple[LanguageModel, torch.Tensor]":
        torch.manual_seed(seed)
        config = ModelConfig(*shape) if isinstance(shape, tuple) else shape
        return LanguageModel(replace(config, cell=cell)), torch.get_rng_state()

    def fresh(cell: str, names: str, window: Window) -> "Recorder":
        def record(dtype: "torch.dtype") -> "ModelRecording":
            model, random_state = drawn(cell, window.seed)
            torch.set_rng_state(random_state)
            model = initialise_model_(deepcopy(model), names)
            return record_text(model, tokens, window.steps, rows=window.rows, dtype=dtype)

        return record

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
