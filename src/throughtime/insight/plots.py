"""Figures, written as PNG by matplotlib: four panels of a report, or the lag curves of several."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from throughtime.errors import InputError
from throughtime.insight.report import GradientReport, LaneReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, BLUE, ORANGE = "#222222", "#777777", "#2563a8", "#c8641e"


def draw(report: GradientReport, path: Path) -> None:
    """Draw the lag matrix, the lag curves, the Lyapunov exponents and the gates' memory.

    Args:
        report: What was measured.
        path: The PNG to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = _figure(path, (11, 7.5))
    figure.suptitle(f"{report.subject} · {report.source}\n{report.verdict.sentence}", fontsize=11, color=INK)
    panels: Any = figure.subplots(2, 2)
    _draw_matrix(panels[0, 0], report.top)
    _draw_curves(panels[0, 1], report)
    _draw_exponents(panels[1, 0], report)
    _draw_memory(panels[1, 1], report.top)
    for axes in panels.flat:
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=120, format="png")


def draw_comparison(reports: Mapping[str, GradientReport], path: Path) -> None:
    """Draw the lag curves of several reports over each other.

    Args:
        reports: By the name that the legend gives.
        path: The PNG to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = _figure(path, (9, 5.5))
    axes: Any = figure.subplots()
    lowest = 1e-4
    for name, report in reports.items():
        of_rows = _rows_by_lag(report.top)
        (line,) = axes.plot([max(v, 1e-12) for v in report.top.curve], lw=1.6, label=f"{name}: {report.verdict.kind}")
        axes.fill_between(
            range(len(of_rows)), of_rows.amin(1), of_rows.amax(1), color=line.get_color(), alpha=0.12, lw=0
        )
        lowest = min(lowest, max(1e-9, min(report.top.curve) / 3))
    axes.axhline(1e-3, color=MUTED, lw=0.8, ls=":")
    axes.set(yscale="log", xlabel="lag k", title="gradient left of a loss at lag k; bands: lowest and highest row")
    axes.set_ylim(bottom=lowest)
    axes.legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _figure(path: Path, size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"{path.name} needs matplotlib, which is not installed; pip install 'throughtime[plot]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rows_by_lag(lane: LaneReport) -> torch.Tensor:
    """Return φ_k / φ_0 of each row for k ≥ 0, (K, B), of what a logarithmic axis can show."""
    of_rows = lane.lag.curve_of_rows[lane.lag.lags >= 0].double()
    return (of_rows / of_rows[0]).clamp(min=1e-12)


def _draw_matrix(axes: "Axes", lane: LaneReport) -> None:
    lag = lane.lag
    matrix = lag.matrix.double().clamp(min=1e-30).log10()
    top = matrix.max().item()
    distance = lag.losses[:, None] - torch.arange(lag.steps)
    shown = matrix.masked_fill((distance < 0) | (distance > lag.lags[-1]), float("nan"))
    image = axes.imshow(shown.numpy(), aspect="auto", vmin=top - 6, vmax=top, cmap="viridis", interpolation="nearest")
    rows = lag.losses.tolist()
    ticks = sorted({0, len(rows) // 2, len(rows) - 1})
    axes.set_yticks(ticks, [str(rows[i]) for i in ticks])
    axes.set(xlabel="step t", ylabel="loss of step s", title="log₁₀ of N[s, t] = ‖∂L_s/∂s_t‖")
    axes.figure.colorbar(image, ax=axes, pad=0.02)  # type: ignore[union-attr]


def _draw_curves(axes: "Axes", report: GradientReport) -> None:
    for lane in report.lanes:
        of_rows = _rows_by_lag(lane)
        lags = range(len(of_rows))
        is_top = lane is report.top
        (line,) = axes.plot(lags, [max(v, 1e-12) for v in lane.curve], lw=1.8 if is_top else 1.0, label=lane.name)
        axes.fill_between(
            lags, of_rows.amin(1).numpy(), of_rows.amax(1).numpy(), color=line.get_color(), alpha=0.15, lw=0
        )
    split = report.top.split
    if split is not None:
        axes.plot(
            (split.direct / split.total[0]).clamp(min=1e-12).numpy(),
            color=MUTED,
            lw=1,
            ls="--",
            label="additive path alone",
        )
    axes.axhline(1e-3, color=MUTED, lw=0.8, ls=":")
    lowest = max(1e-9, min(min(lane.curve) for lane in report.lanes) / 3)
    axes.set(yscale="log", xlabel="lag k", title="gradient left at lag k; band: lowest and highest row")
    axes.set_ylim(bottom=min(lowest, 1e-4))
    axes.legend(fontsize=8, frameon=False)


def _draw_exponents(axes: "Axes", report: GradientReport) -> None:
    for lane in report.lanes:
        axes.plot(range(1, len(lane.exponents) + 1), lane.exponents, "o-", ms=4, lw=1, label=lane.name)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.set(xlabel="i", ylabel="nats per step", title="Lyapunov exponents: below 0 gradients vanish")
    axes.set_xticks(range(1, max((len(lane.exponents) for lane in report.lanes), default=1) + 1))
    axes.legend(fontsize=8, frameon=False)


def _draw_memory(axes: "Axes", lane: LaneReport) -> None:
    if not lane.gates:
        bound = lane.bound
        names, values = ["‖J‖", "radius of J"], [lane.norm, lane.radius]
        if bound is not None:
            names, values = [*names, "σ_max(W_hh)", "radius of W_hh"], [*values, bound.sigma_max, bound.radius]
        axes.bar(names, values, color=BLUE, width=0.6)
        axes.axhline(1, color=MUTED, lw=0.8)
        axes.set(title="size of a step: above 1 it stretches, below it shrinks")
        return
    names = [gate.name for gate in lane.gates]
    places = range(len(names))
    axes.bar(places, [gate.mean for gate in lane.gates], color=BLUE, width=0.25, label="mean opening")
    axes.bar(
        [p + 0.25 for p in places],
        [gate.closed for gate in lane.gates],
        color=MUTED,
        width=0.25,
        label="share below 0.1",
    )
    axes.bar(
        [p + 0.5 for p in places], [gate.open for gate in lane.gates], color=ORANGE, width=0.25, label="share above 0.9"
    )
    axes.set_xticks([p + 0.25 for p in places], names)
    constants = lane.constants or (float("nan"),) * 3
    axes.set(
        ylim=(0, 1.05),
        title="gates; memory time constants τ {:.3g} … {:.3g} … {:.3g} steps".format(*constants),
    )
    axes.legend(fontsize=8, frameon=False)
