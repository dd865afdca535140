"""The files of a run: plain ones, read and written where they are and nowhere else, whole or not at all.

A run may come from a stranger. Whatever in it is a link, a pipe or a device is refused: nothing is followed, nothing is waited for,
and nothing beside the run is written. A file that has another name (a hard link) is read, but never written into: what is behind
the other name may be anybody's.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TextIO

from throughtime.errors import InputError

# Not there on every system; where a link can't be told while it is opened, the check that follows does what it can.
_NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.new", re.DOTALL)
# Bytes of a file of a run that are read at all, so that nobody's file fills the memory: what a few options or figures need, a
# thousand times over; and a vocabulary of ten million words, or the names of a million files.
SMALL, LARGE = 16 << 20, 256 << 20
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class CheckpointError(InputError):
    """A file of a run can't be written, or is not what was written."""


class UnwritableError(CheckpointError):
    """A file of a run can't be written; what was there before still is."""


def open_plain(path: Path, flags: int) -> int:
    """Open a file without following it or waiting for it, and see that it is a plain one; return its descriptor.

    Raises:
        CheckpointError: It is something else, or is to be written into and has another name.
        OSError: It can't be opened.
    """
    try:
        descriptor = os.open(path, flags | _NOT_FOLLOWED, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EMLINK) and os.path.lexists(path):
            raise _not_plain(path, os.lstat(path).st_mode) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _not_plain(path, status.st_mode)
    if status.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
        os.close(descriptor)
        raise CheckpointError(
            f"{path}: has another name too (a hard link), and would be changed under both; put a copy of the file there, or "
            "delete it"
        )
    return descriptor


def open_to_read(path: str | Path, most: int | None = None) -> BufferedReader:
    """Open a plain file.

    Args:
        path: The file.
        most: Bytes that it may hold, if they are bounded.

    Raises:
        CheckpointError: It is missing, unreadable, something else than a plain file, or larger.
    """
    path = Path(path)
    try:
        file = os.fdopen(open_plain(path, os.O_RDONLY), "rb")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    if most is not None and (size := os.fstat(file.fileno()).st_size) > most:
        file.close()
        raise CheckpointError(f"{path}: {size:,} bytes, expected at most {most:,}; restore it")
    return file


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Say of which file it was that it couldn't be read, or that memory ended while it was read.

    Raises:
        CheckpointError: Reading it failed.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: needs more memory than there is; read it on a larger machine") from error


def read(path: str | Path, most: int = SMALL) -> bytes:
    """Return what is in a plain file of `most` bytes at most.

    Raises:
        CheckpointError: It is missing, unreadable, something else than a plain file, or larger.
    """
    with open_to_read(path, most) as file, reading(path):
        return file.read(os.fstat(file.fileno()).st_size)


def open_to_append(path: str | Path) -> TextIO:
    """Open a plain file of text to write at its end; make it if it isn't there.

    Raises:
        CheckpointError: It can't be written, or is something else than a plain file with one name.
    """
    path = Path(path)
    try:
        return os.fdopen(open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8")
    except OSError as error:
        raise UnwritableError(f"{path}: can't be written: {error.strerror}") from error


def create_beside(path: str | Path) -> tuple[Path, BufferedRandom]:
    """Make a new file in the folder of another, under a name that nobody can have foreseen, to be renamed to it.

    Raises:
        OSError: It can't be made.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOT_FOLLOWED, 0o666)
    return beside, os.fdopen(descriptor, "w+b")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file's contents so that a crash leaves the old ones or the new ones, whole.

    Raises:
        UnwritableError: The file can't be written. What was there before still is.
    """
    path = Path(path)
    try:
        beside, file = create_beside(path)
        try:
            with file:
                file.write(data)
            put_in_place(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        kept = "; what was saved before is still there" if os.path.lexists(path) else ""
        raise UnwritableError(f"{path}: can't be written: {error.strerror}{kept}") from error


def put_in_place(beside: Path, path: Path) -> None:
    """Sync a file that is written, rename it, and sync the folder, so that a crash leaves the old one or the new one.

    Raises:
        OSError: It can't be done.
    """
    _sync(beside)
    beside.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what a process that was killed left of files that it was writing; only for who may write there alone."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(Path(folder).iterdir()):
            if is_leftover(entry.name):
                entry.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Return whether a name is one of `create_beside`'s."""
    return _LEFTOVER.fullmatch(name) is not None


def check_folder(path: str | Path) -> None:
    """Raise if there is something else than a folder of its own.

    Raises:
        CheckpointError: It is a link or a file.
    """
    if os.path.lexists(path) and not stat.S_ISDIR(mode := os.lstat(path).st_mode):
        raise CheckpointError(f"{path}: {_kind(mode)}, expected a folder; a run has its own, no links")


def _not_plain(path: Path, mode: int) -> CheckpointError:
    return CheckpointError(f"{path}: {_kind(mode)}, expected a plain file; put the file itself there")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a file")
