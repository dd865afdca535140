"""What a sweep searches: a range or a choice of values for some of training's options, the others one value each.

Nothing here needs torch or Optuna, so that a mistake is answered at once.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from throughtime.errors import FieldError, InputError
from throughtime.lm.kinds import describe
from throughtime.lm.options import ABOUT, DEFAULTS, KINDS, LOG, NAMES, as_given, checked, flag

BETWEEN, COMMA = "..", ","
_WIDER, _FASTER, _DROPPED = 2, 3, 0.6  # the usual space: sizes H/2 … 2H, rates lr/10 … 3 lr, dropout up to 0.6
_CELLS = ("lstm", "gru")
_NUMBERS = (int, float)
_MOST = 2**63
_WITH_COMMAS = ("include", "freeze")  # options whose one value may hold some


@dataclass(frozen=True)
class Span:
    """A range of numbers, both ends included.

    Attributes:
        low: The least.
        high: The largest.
        log: Whether it is searched on a log scale.

    Example:
        >>> str(Span(0.001, 0.1, log=True))
        '0.001..0.1'
    """

    low: float
    high: float
    log: bool

    def __str__(self) -> str:
        return f"{self.low:g}{BETWEEN}{self.high:g}"

    @property
    def plain(self) -> str:
        """As `read_space` takes it, exactly."""
        return f"{self.low}{BETWEEN}{self.high}"

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest."""
        return self.low, self.high

    def suggest(self, trial: Any, name: str) -> Any:
        """Let one of Optuna's trials choose."""
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choices:
    """Values that are each tried as they are.

    Attributes:
        values: At least two.
    """

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return COMMA.join(str(value).lower() if isinstance(value, bool) else str(value) for value in self.values)

    @property
    def plain(self) -> list[Any]:
        """As `read_space` takes them."""
        return list(self.values)

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def suggest(self, trial: Any, name: str) -> Any:
        """Let one of Optuna's trials choose."""
        return trial.suggest_categorical(name, list(self.values))


Space = dict[str, Span | Choices]


def read_space(given: Mapping[str, Any]) -> tuple[dict[str, Any], Space]:
    """Tell what is fixed from what is searched.

    Args:
        given: Options of training by name. A text is read as the command line's, "64..512" as a range and "lstm,gru" as choices;
            a list, which a TOML file may hold, as choices.

    Returns:
        Options with one value, and the others.

    Raises:
        InputError: A value is of the wrong kind, a range is empty or of names, or an option can't be searched.

    Example:
        >>> fixed, space = read_space({"hidden": "64..512", "cell": "lstm,gru", "minutes": "5"})
        >>> fixed, {name: str(axis) for name, axis in space.items()}
        ({'minutes': 5.0}, {'hidden': '64..512', 'cell': 'lstm,gru'})
    """
    fixed: dict[str, Any] = {}
    space: Space = {}
    for name, value in given.items():
        search = ABOUT[name].search if name in ABOUT else ""
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        is_text = isinstance(value, str)
        if isinstance(value, list | tuple) or (is_text and COMMA in value and name not in _WITH_COMMAS):
            values = value.split(COMMA) if isinstance(value, str) else list(value)
            space[name] = _choices(name, values, search)
        elif isinstance(value, str) and BETWEEN in value and (search or str not in _kinds(name)):
            space[name] = _span(name, value, search)
        else:
            fixed[name] = _one(name, value)
    return fixed, space


def usual_space(given: Mapping[str, Any], base: Mapping[str, Any]) -> Space:
    """Return what is searched where nobody said it: cell, width, learning rate and dropout, around what training would take.

    Args:
        given: Options that have a value, and stay.
        base: Options as training would take them.

    Raises:
        InputError: All of them have a value, so that nothing is left to search.
    """
    hidden, rate = base.get("hidden", DEFAULTS["hidden"]), base.get("lr", DEFAULTS["lr"])
    usual: Space = {
        "cell": Choices(_CELLS),
        "hidden": Span(max(hidden // _WIDER, 1), hidden * _WIDER, log=True),
        "lr": Span(rate / 10, rate * _FASTER, log=True),
        "dropout": Span(0.0, _DROPPED, log=False),
    }
    left = {name: axis for name, axis in usual.items() if name not in given}
    if not left:
        names = ", ".join(map(flag, usual))
        raise InputError(
            f"nothing is left to search: {names} have one value each; expected a range or choices, such as --hidden 64..512"
        )
    return left


def described(space: Space) -> str:
    """Return a space as the command line takes it.

    Example:
        >>> described({"lr": Span(0.001, 0.1, log=True), "tied": Choices((False, True))})
        '--lr 0.001..0.1  --no-tied --tied'
    """
    return "  ".join(
        " ".join(as_given(name, value) for value in axis.ends) if _is_switch(name) else f"{flag(name)} {axis}"
        for name, axis in space.items()
    )


def _is_switch(name: str) -> bool:
    return KINDS[name] is bool


def _kinds(name: str) -> tuple[Any, ...]:
    return getattr(KINDS[name], "__args__", (KINDS[name],)) if name in KINDS else (str,)


def _one(name: str, value: Any, given: Any = None) -> Any:
    """Return a value of an option's kind; a message shows what was given, of which it may be a part."""
    if not isinstance(value, str) or str in _kinds(name):
        return value
    for kind in _NUMBERS:
        if kind in _kinds(name):
            with suppress(ValueError, OverflowError):
                return kind(value)
    shown = value if given is None else given
    raise FieldError(name, shown, describe(KINDS[name], value, null=False) + _or_searched(name))


def _or_searched(name: str) -> str:
    """Return what else an option may be in a sweep."""
    search = ABOUT[name].search
    if not search:
        return "; it isn't searched"
    return "" if search == NAMES else f", or a range, such as {_such_as(name)}"


def _such_as(name: str) -> str:
    return "0.001..0.1" if float in _kinds(name) else "1..64"


def _choices(name: str, values: list[Any], search: str) -> Choices:
    shown = COMMA.join(map(str, values))
    if not search:
        raise FieldError(name, shown, "one value; it isn't searched")
    if any(isinstance(value, str) and BETWEEN in value for value in values) and str not in _kinds(name):
        raise FieldError(name, shown, f"choices, or one range, such as {_such_as(name)}, not both")
    are_single = not any(isinstance(value, list | dict) for value in values)  # a TOML file may nest them
    if not are_single or "" in values or len(values) < 2:
        raise FieldError(name, shown, "two values or more, each of them once")
    read = tuple(checked(name, _one(name, value)) for value in values)
    if len(set(read)) < len(read):
        raise FieldError(name, shown, "two values or more, each of them once")
    return Choices(read)


def _span(name: str, text: str, search: str) -> Span:
    if not search:
        raise FieldError(name, text, "one value; it isn't searched")
    if search == NAMES:
        known = _CELLS if name == "cell" else ABOUT[name].names
        raise FieldError(
            name, text, "choices, not a range" + f", such as {flag(name)} {COMMA.join(known[:2])}" * bool(known)
        )
    low, high = (_one(name, end, text) for end in text.split(BETWEEN, 1))
    if not -_MOST < low < high < _MOST:
        within = ", and both of them below 2^63" * (low < high or low == high >= _MOST)
        raise FieldError(name, text, f"a range LOW..HIGH, the first number below the second{within}")
    if search == LOG and low <= 0:
        or_choices = f"; or choices, such as {flag(name)} 0,{high:g}" * _may_be_0(name)
        raise FieldError(name, text, f"a range from above 0, since it is searched on a log scale{or_choices}")
    return Span(low, high, search == LOG)


def _may_be_0(name: str) -> bool:
    with suppress(InputError):
        checked(name, 0)
        return True
    return False
