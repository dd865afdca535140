"""What the page of a report shows beside the report itself: its lag matrix, and one sequence as the network read it.

Arrays are quantised and packed as base64, so that a page of a few hundred kilobytes holds the activity of every unit.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from throughtime.insight.gates import GATES
from throughtime.insight.gradient_flow import input_reach
from throughtime.insight.recording import Lane, ModelRecording
from throughtime.insight.report import GradientReport

LONGEST = 400  # steps of a sequence that a reader can look at one by one
DECADES = 6  # of the lag matrix, below its largest entry
_LARGEST = torch.finfo(torch.float32).max


def matrix_data(report: GradientReport) -> dict[str, Any]:
    """Return the lag matrix of the report's top layer, and its lag curve's lowest and highest row.

    The matrix is log₁₀ N[s, t] in bytes: 1 … 255 from `low` to `high`, and 0 where a loss isn't followed.

    Example:
        >>> import torch
        >>> from throughtime import insight
        >>> recorded = insight.report.record_noise(insight.report.make_layer("gru", 8), steps=20)
        >>> lanes = insight.measure(recorded, lags=12, probes=9)
        >>> report = insight.GradientReport("a GRU", "on noise", "gru", 20, 8, 9, 12, lanes, [])
        >>> matrix_data(report)["norms"]["shape"]
        [9, 20]
    """
    lag = report.top.lag
    log = _finite(lag.matrix).clamp(min=1e-30).log10()
    high = log.max().item()
    distance = lag.losses[:, None] - torch.arange(lag.steps)
    followed = (distance >= 0) & (distance <= lag.lags[-1])
    scaled = 1 + ((log - (high - DECADES)) / DECADES).clamp(0, 1) * 254
    of_rows = lag.curve_of_rows[lag.lags >= 0].double()
    of_rows = of_rows / of_rows[0]
    return {
        "lane": report.lanes.index(report.top),
        "losses": lag.losses.tolist(),
        "norms": {"low": high - DECADES, "high": high, **_packed(torch.where(followed, scaled.round(), 0), np.uint8)},
        "lowest": _numbers(of_rows.amin(1)),
        "highest": _numbers(of_rows.amax(1)),
    }


def reading_data(recorded: ModelRecording, texts: Sequence[str] | None, lags: int) -> dict[str, Any]:
    """Return the first sequence of a recording, step by step: every unit's activity, and what each loss hangs on.

    Args:
        recorded: The forward pass and the losses' gradients; its first `LONGEST` steps are taken.
        texts: What is read at each step, and one more, what is predicted last; `None` for what is no text.
        lags: Over how many lags each loss is followed.

    Returns:
        `lanes`, each with its fields (h, c, and the gates by name) as bytes (T, H) from `low` to `high`; and `shares`
        (T, K) of 16 bits: ‖∂L_s/∂x_{s−k}‖ by loss and lag, as a share of its sum over the lags.

    Example:
        >>> from throughtime import insight
        >>> recorded = insight.report.record_noise(insight.report.make_layer("lstm", 8), steps=20)
        >>> read = reading_data(recorded, None, lags=12)
        >>> [field["name"] for field in read["lanes"][0]["fields"]], read["shares"]["shape"]
        (['h', 'c', 'input gate', 'forget gate', 'output gate'], [20, 12])
    """
    steps = min(LONGEST, recorded.recording.outputs.shape[0])
    recording, gradients = recorded.part(slice(0, 1), slice(steps))
    reach = input_reach(recording, gradients, lags=lags)[:, :, 0].double()
    shares = reach / reach.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "steps": steps,
        "texts": None if texts is None else list(texts[: steps + 1]),
        "lanes": [{"name": lane.name, "units": lane.widths[0], "fields": _fields(lane)} for lane in recording.lanes],
        "shares": _packed((shares * 65535).round(), np.dtype("<u2")),
    }


def _fields(lane: Lane) -> list[dict[str, Any]]:
    parts = dict(zip(("h", "c"), lane.states, strict=False))
    if lane.cell.spec.gates > 1:
        parts |= {
            f"{name} gate": lane.saved_fields[field] for field, name in GATES.items() if field in lane.saved_fields
        }
    return [{"name": name, **_quantised(part[:, 0])} for name, part in parts.items() if part.shape[2] == lane.widths[0]]


def _quantised(values: Tensor) -> dict[str, Any]:
    """Return values as bytes 0 … 255 from their lowest to their highest."""
    values = _finite(values)
    low, high = values.min().item(), values.max().item()
    scaled = (values - low) / ((high - low) or 1.0) * 255
    return {"low": low, "high": high, **_packed(scaled.round(), np.uint8)}


def _packed(values: Tensor, kind: Any) -> dict[str, Any]:
    array = torch.nan_to_num(values, nan=0.0).numpy().astype(kind)
    return {"shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode("ascii")}


def _finite(values: Tensor) -> Tensor:
    """Return values in float64 with infinity at float32's edge, and zero for what is no number: JSON has neither."""
    return values.double().nan_to_num(nan=0.0, posinf=_LARGEST, neginf=-_LARGEST).clamp(-_LARGEST, _LARGEST)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
