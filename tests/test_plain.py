import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throughtime.plain import printable, to_json

COMMANDS = [
    "\x1b[2J",
    "\x9b2J",
    "\x07",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u200f",
    "\u061c",
    "\ud800",
    "\ufeff",
    "\u2028",
    "\x85",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_commands_a_terminal_or_turns_text_is_an_escape(command):
    shown = printable(f"a{command}b")
    assert shown.isprintable()
    assert "\\" in shown
    written = to_json({"name": f"a{command}b"})
    assert written.isprintable()
    assert json.loads(written) == {"name": f"a{command}b"}


@pytest.mark.parametrize("text", ["한글 텍스트", "می‌خواهم", "👩‍🔬", "全角　空白", "no break", "Ünïcødé", "שלום"])
def test_letters_of_any_script_stay(text):
    assert printable(text) == text
    assert text in to_json([text])


@given(st.text())
def test_nothing_unprintable_is_left(text):
    for shown in (printable(text), to_json(text)):
        assert all(c.isprintable() or c.isspace() or c in "\u200c\u200d" for c in shown)
        assert not set(shown) & set(map(chr, [*range(32), *range(127, 160), 0x85, 0x2028, 0x2029]))
        shown.encode()
    assert json.loads(to_json(text)) == text


def test_numbers_that_json_lacks_are_null():
    assert to_json({"a": [math.nan, -math.inf, (1.5, math.inf)], "b": {"c": math.nan}}) == (
        '{"a": [null, null, [1.5, null]], "b": {"c": null}}'
    )
