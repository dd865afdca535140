"""Values from a file, made the fields of a dataclass: the right names and types, or one line that says which isn't."""

from dataclasses import fields
from typing import Any, TypeVar

from throughtime.training.files import CheckpointError

T = TypeVar("T")

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


def describe(kind: Any, value: Any) -> str:
    """Return in words what is expected of a field instead of a value that doesn't fit."""
    bound = " below 2^63" if _is_too_large(value) else ""
    return " or ".join(_WANTED[each] + bound * (each is int) for each in getattr(kind, "__args__", (kind,)))


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63


def made_of(cls: type[T], values: Any, where: str) -> T:
    """Make a dataclass of a JSON object.

    Args:
        cls: The dataclass, whose fields are numbers, texts and truth values.
        values: The object.
        where: What the object is, for the message: a file's name.

    Raises:
        CheckpointError: It is no object, or has a name, a type or a value that can't be.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: a JSON {type(values).__name__}, expected an object; restore it")
    kinds = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in kinds:
            raise CheckpointError(f"{where}: {name!r} is nothing that it holds; restore it")
        if not fits(value, kinds[name]):
            raise CheckpointError(
                f"{where}: {name} is a {type(value).__name__}, expected {describe(kinds[name], value)}; restore it"
            )
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}; restore it") from error
