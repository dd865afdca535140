"""What torchrun says of this process, read from its environment without torch."""

import os
from typing import NamedTuple

from throughtime.errors import InputError

_DIGITS = 9  # torch counts processes in 32 bits
_HOW = "start the processes by torchrun --nproc-per-node N -m throughtime train …, or unset WORLD_SIZE for a single one"


class Launch(NamedTuple):
    """One of the processes that were started together.

    Attributes:
        rank: Which one, from 0 on.
        size: How many there are.
        local_rank: Which one it is on its machine.
        restarts: How often all of them were started again.
        most_restarts: How often they would be, if one is lost.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    most_restarts: int = 0


def launched() -> Launch:
    """Return which of the processes that were started together this one is.

    Raises:
        InputError: The environment speaks of several, but doesn't say how they meet, or says what can't be.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    restarts, most = _number("TORCHELASTIC_RESTART_COUNT", 0), _number("TORCHELASTIC_MAX_RESTARTS", 0)
    if size == 1:
        return Launch(restarts=restarts, most_restarts=most)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(f"WORLD_SIZE is {size}, but {name} isn't set; {_HOW}")
    _number("MASTER_PORT", 0, least=1)  # 0, any free one, the processes couldn't tell each other
    rank = _number("RANK", 0)
    if rank >= size:
        raise InputError(f"RANK is {rank}, and WORLD_SIZE {size}: expected a rank below it; {_HOW}")
    return Launch(rank, size, _number("LOCAL_RANK", rank), restarts, most)


def _number(name: str, otherwise: int, least: int = 0) -> int:
    given = os.environ.get(name)
    if not given:
        return otherwise
    is_whole = given.isascii() and given.isdecimal()
    if is_whole and len(given) <= _DIGITS and int(given) >= least:
        return int(given)
    below = f" and of {_DIGITS} digits at most" * (is_whole and len(given) > _DIGITS)
    raise InputError(f"{name} is {given!r}: expected a whole number, at least {least}{below}; {_HOW}")
