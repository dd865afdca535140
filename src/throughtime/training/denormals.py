"""Denormals: numbers too small for a whole significand. Gradients die out in them, and each costs many CPUs a hundred cycles."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from throughtime.kernels import native


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Take numbers below 1.2e-38 (float32; 2.2e-308 in float64) for zero within this context, as the native kernels always do.

    It holds in the calling thread and in those that torch's operators share its work with; afterwards each does what it did before.
    `torch.set_flush_denormal` sets the calling thread alone; without the native kernels that is all that is done here.

    Example:
        >>> import torch
        >>> from throughtime.training import flush_denormals
        >>> tiny = torch.tensor(2e-38)
        >>> with flush_denormals():
        ...     (tiny / 10).item()
        0.0
        >>> (tiny / 10).item() > 0
        True
    """
    if native.module is None:
        is_flushing = sys.float_info.min / 2 == 0
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(is_flushing)
        return
    before = native.module.flush_denormals(torch.get_num_threads())
    try:
        yield
    finally:
        native.module.restore_denormals(torch.get_num_threads(), before)
