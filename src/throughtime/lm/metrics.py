"""The lines of metrics.jsonl: each carries a checksum of itself, since the file grows and can have no digest."""

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from throughtime.training.files import CheckpointError, open_to_append, open_to_read, reading, write_atomically

_LONGEST = 1 << 20  # bytes of a line, which are a few hundred, and more where gradients of many layers are measured
_CHECK = b', "crc32": '
_WHOLE = re.compile(rb', "crc32": \d+\}')
_NEEDED = {None: ("step", "seconds", "loss"), "validation": ("step", "seconds", "loss"), "rollback": ("step",)}
_WORDS = ("event", "reason")


def line_of(record: dict[str, Any]) -> str:
    r"""Return the line of a record, its checksum last.

    Example:
        >>> line_of({"step": 1})
        '{"step": 1, "crc32": 1034584890}\n'
    """
    body = json.dumps(record)[:-1]
    return f'{body}, "crc32": {zlib.crc32(body.encode())}}}\n'


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file's lines; a last line that a crash cut off is left out.

    Raises:
        CheckpointError: A line is damaged, or holds something else than was written.
    """
    if not os.path.lexists(path):
        return []
    return [
        _record(line, _place(path, number))
        for number, line in _lines(path)
        if line.endswith(b"\n") or _WHOLE.search(line)  # whole but for its end, so that it wasn't cut off
    ]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers; the last may have no end."""
    with open_to_read(path) as file, reading(path):
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if len(line) == _LONGEST:
                raise CheckpointError(
                    f"{_place(path, number)} is longer than {_LONGEST:,} bytes; restore the file, or delete it"
                )
            yield number, line


def _place(path: Path, number: int) -> str:
    return f"{path}: line {number}"


def open_metrics(path: Path) -> TextIO:
    """Open the file to write more lines.

    It is made anew of its whole lines, so that what a crash cut off spoils no further line, and no other name of the file sees what
    comes.

    Raises:
        CheckpointError: It can't be read or written.
    """
    if os.path.lexists(path):
        write_atomically(path, b"".join(line for _, line in _lines(path) if line.endswith(b"\n")))
    return open_to_append(path)


def _record(line: bytes, where: str) -> dict[str, Any]:
    body, _, check = line.removesuffix(b"\n").rpartition(_CHECK)
    if check != b"%d}" % zlib.crc32(body):
        raise CheckpointError(f"{where} is damaged (its checksum doesn't match); restore the file, or delete it")
    try:
        record = json.loads(body + b"}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); restore the file, or delete it") from error
    event = record.get("event")
    needed = _NEEDED.get(event) if isinstance(event, str | None) else None
    if needed is None or not all(isinstance(record.get(name), int | float) for name in needed):
        raise CheckpointError(f"{where} is none of a training's; restore the file, or delete it")
    for name, value in record.items():
        if not isinstance(value, str if name in _WORDS else int | float | None) or _is_beyond_floats(value):
            raise CheckpointError(f"{where}: {name} is no number; restore the file, or delete it")
    return record


def _is_beyond_floats(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > 2**63
