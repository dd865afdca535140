"""The one exception that means: what was given is at fault, and here is what to do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A file, a value or a name given by the user can't be used.

    The message is one line that says what was given, what was expected and what to do. The command line prints it and
    exits with 2.
    """


def unknown_name(kind: str, given: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that isn't among `known`, with the nearest one that is.

    Args:
        kind: What the name names, as a reader would say it: "cell", "level".
        given: The name that was given.
        known: The names that would have been right.

    Example:
        >>> str(unknown_name("cell", "lstn", ["rnn", "lstm", "gru"]))
        "unknown cell 'lstn'; did you mean 'lstm'? Known: rnn, lstm, gru"
    """
    known = list(known)
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return InputError(f"unknown {kind} {given!r}{hint} Known: {', '.join(known)}")
