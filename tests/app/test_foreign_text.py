"""What a stranger wrote into a run comes out as text that commands no terminal, in a table and in JSON."""

import json
import shutil
from pathlib import Path

import pytest

from throughtime.lm.run import open_run

HOSTILE = "a\x1b[2Jb\x9bc\u202ed\x07e"


@pytest.fixture
def foreign(run: Path, tmp_path: Path) -> Path:
    """A run whose name isn't what it seems."""
    folder = tmp_path / HOSTILE
    shutil.copytree(run, folder)
    return folder


def _is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "RUN"),
        ("info", "RUN", "--json"),
        ("gradients", "RUN", "--lags", 8, "--probe", 4),
        ("gradients", "RUN", "--lags", 8, "--probe", 4, "--json"),
        ("compare-gradients", "RUN", "gru", "--lags", 8, "--probe", 4),
        ("compare-gradients", "RUN", "gru", "--lags", 8, "--probe", 4, "--json"),
        ("eval", "RUN", "TEXT"),
        ("plot", "RUN"),
        ("train", "--resume", "RUN"),
        ("info", "RUN/nowhere"),
    ],
)
def test_nothing_foreign_commands_the_terminal(arguments, throughtime, foreign: Path, text: Path) -> None:
    placed = [str(word).replace("RUN", str(foreign)).replace("TEXT", str(text)) for word in arguments]
    ended = throughtime(*placed)
    assert ended.code in (0, 2)
    assert _is_harmless(ended.out)
    assert _is_harmless(ended.err)
    assert "\\x1b[2J" in ended.out + ended.err or "\\u001b[2J" in ended.out or arguments[0] == "eval"
    if "--json" in arguments:
        assert json.loads(ended.out)


def test_a_name_comes_back_from_json(throughtime, foreign: Path) -> None:
    assert throughtime("info", foreign, "--json").json["run"] == str(foreign) == str(open_run(foreign).folder)
