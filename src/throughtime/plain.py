"""Text that any terminal can show and JSON that any parser reads, whatever is in it.

Names, paths and texts come from files that somebody else may have made. What isn't printable in them is shown by its escape.
"""

import json
import math
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

_JOINERS = "\u200c\u200d"  # without which Persian is misspelt and emoji fall apart
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def printable(text: str, keep: str = "") -> str:
    r"""Return text that can't command a terminal or turn the direction of what stands beside it.

    Control characters, line ends among them, marks that turn text, lone surrogates and what is no character are shown by their
    escapes. Letters and spaces of any script, and what joins letters, stay.

    Args:
        text: From anywhere.
        keep: Characters to leave as they are, whatever they are.

    Example:
        >>> printable("한글 a\x1b[2J\x9b\u202eb\n"), printable("a\tb\n", keep="\n")
        ('한글 a\\x1b[2J\\x9b\\u202eb\\n', 'a\\tb\n')
    """

    def shown(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep or _is_harmless(character) else escape(character)

    return _NOT_ASCII.sub(shown, text)


def escape(character: str) -> str:
    r"""Return a character's escape, as Python writes it: \x1b, \u202e."""
    return character.encode("unicode_escape").decode("ascii")


def shell_word(name: str | Path) -> str:
    """Return the name of a file as a shell takes it: in quotes where they are needed, and never an option.

    Example:
        >>> print(shell_word("run"), shell_word("my run"), shell_word("-x"))
        run 'my run' ./-x
    """
    name = str(name)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def finite(value: Any) -> Any:
    """Return a value with every number that JSON lacks (NaN, ±∞) as `None`.

    Example:
        >>> finite({"a": [1.0, math.nan], "b": math.inf})
        {'a': [1.0, None], 'b': None}
    """
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None) -> str:
    r"""Return a value as JSON that every parser reads and every terminal can show.

    Numbers that JSON lacks are null, and what is no JSON type is its text. Letters of any script stand as they are; what
    `printable` would escape is a JSON escape.

    Example:
        >>> print(to_json({"한": math.nan, "run": "a\x9b\u202eb"}))
        {"한": null, "run": "a\u009b\u202eb"}
    """

    def shown(match: re.Match[str]) -> str:
        character = match[0]
        return character if character == "\n" or _is_harmless(character) else json.dumps(character)[1:-1]

    text = json.dumps(finite(value), ensure_ascii=False, default=str, allow_nan=False, indent=indent)
    return _NOT_ASCII.sub(shown, text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
