"""How many threads torch's operators take in a time loop.

A step of a loop waits for all of them. Where it has little to do, that costs more than it saves: threads spin between the steps,
and beside other programs each step waits until the system lets all of them run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 28  # multiplications that one thread does in a few milliseconds


@contextmanager
def step_threads(multiplications: int = 0) -> Iterator[None]:
    """Let torch compute with one thread in this context, if the steps of the loop in it are small.

    Args:
        multiplications: Of a step; 0 for what is small anyway.

    Example:
        >>> import torch
        >>> from throughtime.insight.threads import step_threads
        >>> with step_threads(16 * 512 * 128):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if multiplications > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
