"""Another process that keeps a core busy, while somebody is timed."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_UNDER_WAY = 0.2  # seconds until it has started and the scheduler knows it


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Start a process that computes without end; stop it in the end."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(_UNDER_WAY)
        yield
    finally:
        process.kill()
        process.wait()
