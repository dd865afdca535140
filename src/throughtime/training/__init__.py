"""Training of any model that returns (output, state): truncated BPTT, clipping, schedules, checkpoints, ranks, and the loop."""

from throughtime.training.averaging import NonMonotone, exponential_average, mean
from throughtime.training.checkpoint import CheckpointError
from throughtime.training.clipping import Clipping, ClipReport
from throughtime.training.denormals import flush_denormals
from throughtime.training.guard import DivergedError, LossWatch, NonFiniteError
from throughtime.training.loop import Loop, Probe, Rollback, StepReport, Validate, Validation, Windows
from throughtime.training.ranks import LostRankError, Ranks, joined
from throughtime.training.schedule import Budget, Schedule
from throughtime.training.sequences import Sequences
from throughtime.training.tbptt import Streams, detach

__all__ = [
    "Budget",
    "CheckpointError",
    "ClipReport",
    "Clipping",
    "DivergedError",
    "Loop",
    "LossWatch",
    "LostRankError",
    "NonFiniteError",
    "NonMonotone",
    "Probe",
    "Ranks",
    "Rollback",
    "Schedule",
    "Sequences",
    "StepReport",
    "Streams",
    "Validate",
    "Validation",
    "Windows",
    "detach",
    "exponential_average",
    "flush_denormals",
    "joined",
    "mean",
]
