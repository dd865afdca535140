"""The scalars of metrics.jsonl for TensorBoard, by tensorboardX, which needs no TensorFlow."""

import importlib.util
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from throughtime.errors import InputError


class Board(Protocol):
    """Takes the lines of metrics.jsonl."""

    def __call__(self, record: dict[str, Any]) -> None:
        """Write down the numbers of one line, at its step."""
        ...


def check_library() -> None:
    """Raise InputError unless tensorboardX is there."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError("--tensorboard needs tensorboardX: pip install 'throughtime[tensorboard]'")


@contextmanager
def board(folder: Path | None, steps_done: int) -> Iterator[Board]:
    """Yield what writes scalars to a folder that `tensorboard --logdir` reads, or nothing where there is none.

    Args:
        folder: Where to.
        steps_done: Steps before this part of a training; what an earlier part wrote beyond them is no longer shown.
    """
    if folder is None:
        yield lambda record: None
        return
    check_library()
    from tensorboardX import SummaryWriter

    # The rest of the name is the time and the machine's: somebody could have put another file's name there.
    unforeseen = f".{secrets.token_hex(8)}"
    purged = steps_done + 1 if steps_done else None
    writer = SummaryWriter(str(folder), purge_step=purged, filename_suffix=unforeseen)

    def write(record: dict[str, Any]) -> None:
        prefix = f"{record['event']}/" if "event" in record else "training/"
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(prefix + name, float(value), record["step"])

    try:
        yield write
    finally:
        writer.close()
