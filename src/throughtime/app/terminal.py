"""The two consoles: results go to stdout, everything said along the way goes to stderr."""

import sys

from rich.console import Console


def results() -> Console:
    """Return the console on stdout. Text is printed as it is: no markup, no emoji codes, no guessed highlighting."""
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)


def messages() -> Console:
    """Return the console on stderr, for progress and notes."""
    return Console(file=sys.stderr, markup=False, emoji=False, highlight=False)


def visible(text: str) -> str:
    r"""Return text in which every character is seen: a space as ␣, a line end as ↵, anything unprintable by its escape.

    Example:
        >>> visible("a b\n")
        'a␣b↵'
    """
    return "".join(_visible_character(character) for character in text)


def number(value: float, digits: int = 3) -> str:
    """Return a number with a fixed count of digits and a true minus sign; what rounds to zero has no sign.

    Example:
        >>> number(-0.12345), number(-0.00001)
        ('−0.123', '0.000')
    """
    shown = f"{value:.{digits}f}"
    if shown.startswith("-"):
        shown = shown[1:] if float(shown) == 0 else "−" + shown[1:]
    return shown


def _visible_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


_VISIBLE = {" ": "␣", "\n": "↵", "\r": "↤", "\t": "⇥"}
