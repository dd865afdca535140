"""Training of any model that returns (output, state): truncated BPTT, clipping, schedules, checkpoints, and the loop."""

from throughtime.training.checkpoint import CheckpointError
from throughtime.training.clipping import Clipping, ClipReport
from throughtime.training.guard import NonFiniteError
from throughtime.training.loop import Loop, StepReport, Windows
from throughtime.training.schedule import Budget, warmup_cosine
from throughtime.training.sequences import Sequences
from throughtime.training.tbptt import Streams, detach

__all__ = [
    "Budget",
    "CheckpointError",
    "ClipReport",
    "Clipping",
    "Loop",
    "NonFiniteError",
    "Sequences",
    "StepReport",
    "Streams",
    "Windows",
    "detach",
    "warmup_cosine",
]
