"""One process at a time trains in a folder: a lock that ends with the process that holds it, however that ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from throughtime.training.files import CheckpointError, UnwritableError, open_plain

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None

LOCK = ".lock"


@contextmanager
def lock(folder: str | Path, name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process alone, until the block ends.

    Args:
        folder: Which.
        name: The lock's file, where a folder has several.
        wait: Whether to wait while another process holds it.

    Raises:
        CheckpointError: Another process holds it; with its number, which is that in the lock's file.
    """
    path = Path(folder) / name
    descriptor = _hold(path, wait)
    try:
        yield
    finally:
        with suppress(OSError):  # gone with the folder
            path.unlink()
        os.close(descriptor)


def check_unlocked(folder: str | Path) -> None:
    """Raise if another process holds a folder; nothing is written there.

    Raises:
        CheckpointError: With its number.
    """
    path = Path(folder) / LOCK
    if os.path.lexists(path):
        with suppress(FileNotFoundError):
            descriptor = open_plain(path, os.O_RDWR)
            try:
                _take(descriptor, path)
            finally:
                os.close(descriptor)


def _hold(path: Path, wait: bool) -> int:
    while True:
        try:
            descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UnwritableError(f"{path}: can't be written: {error.strerror}") from error
        try:
            _take(descriptor, path, wait)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it before has removed it meanwhile


def _take(descriptor: int, path: Path, wait: bool = False) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        number = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        who, stop = (f"process {number}", f", stop it (kill {number})") if number.isdecimal() else ("a process", "")
        raise CheckpointError(
            f"{path.parent}: {who} is training there; wait until it is done{stop}, or take another folder"
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
