"""How much may be asked of an instrument at once: each seed and each layer costs what one does, however little memory it takes."""

from throughtime.errors import InputError

MOST_SEEDS = 100  # more are measured in further calls, from another --seed
MOST_LAYERS = 100
_MOST = {"seeds": (MOST_SEEDS, "; for more, call again with another --seed"), "layers": (MOST_LAYERS, "")}


def check_counts(**counts: int | None) -> None:
    """Refuse numbers of options, by their names, that are below 1 or that no measurement would end with; `None` is right.

    Raises:
        InputError: With what was given and what was expected.

    Example:
        >>> check_counts(seeds=3, lags=None)
        >>> check_counts(seeds=1000)
        Traceback (most recent call last):
        throughtime.errors.InputError: --seeds 1000: expected a whole number from 1 to 100; for more, call again with another --seed
    """
    for name, value in counts.items():
        if value is None:
            continue
        most, instead = _MOST.get(name, (None, ""))
        if most is None and value < 1:
            raise InputError(f"--{name} {value}: expected a whole number, at least 1")
        if most is not None and not 1 <= value <= most:
            raise InputError(f"--{name} {value}: expected a whole number from 1 to {most}{instead}")
