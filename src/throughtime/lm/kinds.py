"""Values as they come from a person, a file or a library, and the kinds that fields are of."""

from typing import Any

from throughtime.errors import FieldError

_WANTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a field's type; a whole number serves where a number is meant.

    Example:
        >>> fits(3, float), fits(True, int), fits(None, int | None), fits("3", int)
        (True, False, True, False)
    """
    kinds = getattr(kind, "__args__", (kind,))
    allowed = (*kinds, int) if float in kinds else kinds
    if _is_too_large(value):
        return False
    return isinstance(value, allowed) and (bool in kinds or not isinstance(value, bool))


def describe(kind: Any, value: Any, *, null: bool = True) -> str:
    """Return in words what is expected of a field instead of a value that doesn't fit; where nobody can write null, without it."""
    bound = " below 2^63" if _is_too_large(value) else ""
    kinds = [each for each in getattr(kind, "__args__", (kind,)) if null or each is not type(None)]
    return " or ".join(_WANTED[each] + bound * (each is int) for each in kinds)


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63


def settled(name: str, value: Any, kind: Any) -> Any:
    """Return a field's value, a number of NumPy's as Python's own.

    Raises:
        FieldError: It is not of the field's type, or a text that can't be written to a file.

    Example:
        >>> import numpy as np
        >>> settled("batch", np.int64(8), int | None)
        8
    """
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if not fits(value, kind):
        raise FieldError(name, value, describe(kind, value, null=False))
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FieldError(name, value, "text without bytes that are no UTF-8") from error
    return value
