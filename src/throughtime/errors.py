"""The one exception that means: what was given is at fault, and here is what to do; and the one warning of our own."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, a value or a name given by the user can't be used.

    The message is one line that says what was given, what was expected and what to do. The command line prints it and
    exits with 2.
    """


class FieldError(InputError):
    """A field of an object, or an argument, can't be what was given. The command line names its own option instead.

    Attributes:
        field: Its name.
        value: What was given.
        expected: What was expected, in words.

    Example:
        >>> str(FieldError("batch", 0, "a whole number, at least 1"))
        'batch = 0: expected a whole number, at least 1'
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} = {value!r}: expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class MissingKernelsWarning(RuntimeWarning):
    """Layers compute on the CPU without the C++ kernels: the same numbers, more slowly. Given once in a process.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", MissingKernelsWarning)  # known, and meant
    """


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Return the known name that is meant by one that is cut short or misspelt, or `None` where none is near.

    Example:
        >>> nearest("temp", ["stop", "temperature"]), nearest("hiden", ["hidden"]), nearest("version", ["train"])
        ('temperature', 'hidden', None)
    """
    known = list(known)
    begun = sorted((name for name in known if given and name.startswith(given)), key=len)
    return next(iter(begun or difflib.get_close_matches(given, known, n=1)), None)


def unknown_name(kind: str, given: object, known: Iterable[str]) -> InputError:
    """Return the error for a name that isn't among `known`, with the nearest one that is.

    Args:
        kind: What the name names, as a reader would say it: "cell", "level".
        given: The name that was given, or whatever stands in its place.
        known: The names that would have been right.

    Example:
        >>> str(unknown_name("cell", "lstn", ["rnn", "lstm", "gru"]))
        "unknown cell 'lstn'; did you mean 'lstm'? Known: rnn, lstm, gru"
    """
    known = list(known)
    meant = nearest(given, known) if isinstance(given, str) else None
    hint = f"; did you mean {meant!r}?" if meant else "."
    return InputError(f"unknown {kind} {given!r}{hint} Known: {', '.join(known)}")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ended, the CPU's or a GPU's."""
    return (
        isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)
    )
