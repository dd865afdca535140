"""What becomes of an exception: one clear line on stderr, and an exit code. Of a warning of ours: the line."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import typer

from throughtime.errors import FieldError, InputError, MissingKernelsWarning, is_out_of_memory, nearest
from throughtime.lm.options import flag
from throughtime.plain import printable

BUG, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
BY_SIGNAL = 128  # and the signal's number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP
TRACEBACK_VARIABLE = "THROUGHTIME_TRACEBACK"


def report(error: Exception, *, command: str, with_traceback: bool = False) -> int:
    """Say on stderr what went wrong, in one line, and return the exit code.

    Args:
        error: An `InputError`, a usage error of the command line, an `OSError`, or anything else, which is a bug.
        command: The command as it was called, "throughtime train".
        with_traceback: Show a bug's traceback; `THROUGHTIME_TRACEBACK=1` asks for it too.

    Returns:
        2 where the input is at fault, 1 for a bug.
    """
    explanation = _explanation(error, command)
    if explanation is not None:
        say(command, explanation)
        return BAD_INPUT
    if with_traceback or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    else:
        say(
            command,
            f"this is a bug in throughtime, please report it: {type(error).__name__}: {error} "
            f"({TRACEBACK_VARIABLE}=1 shows where)",
        )
    return BUG


@contextlib.contextmanager
def warnings_in_a_line(command: str) -> Iterator[None]:
    """Say a warning of our own as an error is said, without the place in the code that Python shows with it.

    What matplotlib notes of its own folders is left out; a figure is drawn all the same.
    """
    drawing = logging.getLogger("matplotlib")
    level = drawing.level
    drawing.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(drawing.setLevel, level)
        otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, MissingKernelsWarning):
                say(command, f"warning: {message}")
            else:
                otherwise(message, category, *place, **more)

        warnings.showwarning = show
        yield


def say(command: str, message: str) -> None:
    """Write one line to stderr, whatever is in the message: no line breaks, no control characters, no wrapping."""
    line = printable(" ".join(message.split()))
    if _is_coloured():
        command = f"\033[1;31m{command}\033[0m"
    print(f"{command}: {line}", file=sys.stderr)


def _is_coloured() -> bool:
    """Return whether stderr is a terminal that shows colours, and nobody asked for none."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not os.environ.get("NO_COLOR")


def _explanation(error: Exception, command: str) -> str | None:
    """Return what the user can do about an error, or `None` if it is ours."""
    if isinstance(error, FieldError):
        return f"{flag(error.field)} {error.value}: expected {error.expected}"
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, typer.TyperException):
        return _usage(error, command)
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{name}{error.strerror[0].lower()}{error.strerror[1:]}"
    if is_out_of_memory(error):
        return "out of memory; lower --hidden, --layers, --batch or --bptt"
    return None


def _usage(error: typer.TyperException, command: str) -> str:
    """Return a usage error's message: what was given, what was expected, and where the options are explained."""
    message = error.format_message().rstrip(".")
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    if hasattr(error, "possibilities") and context is not None:  # an unknown option
        message = _unknown_option(error.option_name, context)  # type: ignore[attr-defined]
    elif isinstance(error.__cause__, ValueError) and parameter is not None:
        message = _wrong_type(error.__cause__, max(parameter.opts, key=len)) or message
    separator = "" if message.endswith("?") else ";"
    return f"{message[0].lower()}{message[1:]}{separator} '{command} --help' explains the options"


def _unknown_option(given: str, context: typer.Context) -> str:
    """Name the option that was given, and the known one that is meant; the dashes are no likeness."""
    parameters = context.command.get_params(context)
    known = {
        name.lstrip("-"): name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)
    }
    meant = nearest(given.lstrip("-"), known)
    return f"unknown option {given}" + (f"; did you mean {known[meant]}?" if meant else "")


def _wrong_type(cause: ValueError, name: str) -> str | None:
    """Say in our words what pydantic, which typer reads values with, found wrong with a number."""
    try:
        found = cause.errors()[0]  # type: ignore[attr-defined]
    except (AttributeError, IndexError):
        return None
    expected = {"int": "a whole number", "float": "a number"}.get(found["type"].split("_")[0])
    return f"{name} {found['input']}: expected {expected}" if expected else None
