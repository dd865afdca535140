"""Values from a file, made the fields of a dataclass: the right names and types, or one line that says which isn't."""

from dataclasses import fields
from typing import Any, TypeVar

from throughtime.lm.kinds import describe, fits
from throughtime.training.files import CheckpointError

T = TypeVar("T")


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
