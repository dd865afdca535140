"""Instruments that show and measure what backpropagation through time does.

`record` runs a layer and keeps what the instruments read; they are functions of that recording.

`worked_example` works one word through, every number shown; `throughtime explain` prints it.
"""

from throughtime.insight.adjoint import total_adjoint
from throughtime.insight.gradient_flow import (
    Horizon,
    LagMatrix,
    cancellation,
    connectivity,
    horizon,
    itemised_gradients,
    lag_gradients,
    lag_matrix,
    tail_decay,
    truncation_length,
)
from throughtime.insight.recording import Lane, ModelRecording, Recording, record, record_model

__all__ = [
    "Horizon",
    "LagMatrix",
    "Lane",
    "ModelRecording",
    "Recording",
    "cancellation",
    "connectivity",
    "horizon",
    "itemised_gradients",
    "lag_gradients",
    "lag_matrix",
    "record",
    "record_model",
    "tail_decay",
    "total_adjoint",
    "truncation_length",
]
