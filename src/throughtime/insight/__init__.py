"""Instruments that show and measure what backpropagation through time does.

`record` runs a layer and keeps what the instruments read, `record_model` the layer inside a model; everything else is a
function of that recording. A lane is one layer in one direction; `Lane.states` is the activity of each of its units.

`worked_example` works one word through, every number shown; `throughtime explain` prints it.
"""

from throughtime.insight.adjoint import total_adjoint
from throughtime.insight.clipping import (
    ClippedLags,
    ClipStatistics,
    clip_statistics,
    clipped_lags,
    lag_shares,
    value_clip_cosine,
)
from throughtime.insight.gates import GateUse, PathSplit, carousel, gate_use, path_split, time_constants
from throughtime.insight.gradient_flow import (
    Horizon,
    LagMatrix,
    cancellation,
    connectivity,
    curve_interval,
    horizon,
    input_reach,
    itemised_gradients,
    lag_gradients,
    lag_matrix,
    tail_decay,
    truncation_bias,
    truncation_length,
)
from throughtime.insight.recording import Lane, ModelRecording, Recording, record, record_model
from throughtime.insight.report import GradientReport, find_overflow, measure, measure_finite
from throughtime.insight.spectrum import (
    SpectralBound,
    StepSize,
    jacobian_product,
    jacobians,
    lyapunov_spectrum,
    pascanu_bound,
    step_size,
)
from throughtime.insight.tasks import Result, Task, equal_width, make_task, solve, task_names
from throughtime.insight.tracking import GradientFlow, track_gradients
from throughtime.insight.verdict import Need, Overflow, Verdict, judge

__all__ = [
    "ClipStatistics",
    "ClippedLags",
    "GateUse",
    "GradientFlow",
    "GradientReport",
    "Horizon",
    "LagMatrix",
    "Lane",
    "ModelRecording",
    "Need",
    "Overflow",
    "PathSplit",
    "Recording",
    "Result",
    "SpectralBound",
    "StepSize",
    "Task",
    "Verdict",
    "cancellation",
    "carousel",
    "clip_statistics",
    "clipped_lags",
    "connectivity",
    "curve_interval",
    "equal_width",
    "find_overflow",
    "gate_use",
    "horizon",
    "input_reach",
    "itemised_gradients",
    "jacobian_product",
    "jacobians",
    "judge",
    "lag_gradients",
    "lag_matrix",
    "lag_shares",
    "lyapunov_spectrum",
    "make_task",
    "measure",
    "measure_finite",
    "pascanu_bound",
    "path_split",
    "record",
    "record_model",
    "solve",
    "step_size",
    "tail_decay",
    "task_names",
    "time_constants",
    "total_adjoint",
    "track_gradients",
    "truncation_bias",
    "truncation_length",
    "value_clip_cosine",
]
