"""What a stranger wrote into a run comes out as text that commands no terminal, in a table and in JSON."""

import json
import shlex
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
    said = "".join((ended.out + ended.err).split())  # a table may break a long name at any letter
    assert "\\x1b[2J" in said or "\\u001b[2J" in said or arguments[0] == "eval"
    if "--json" in arguments:
        assert json.loads(ended.out)


def test_a_name_comes_back_from_json(throughtime, foreign: Path) -> None:
    assert throughtime("info", foreign, "--json").json["run"] == str(foreign) == str(open_run(foreign).folder)


@pytest.mark.parametrize("name", ["my run", "a'b; $(c)", "-x y"])
def test_what_is_advised_can_be_pasted(
    name: str, throughtime, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = throughtime("train", text, "--out", name, "--steps", 2, "--hidden", 8)
    program, *arguments = shlex.split(trained.err.splitlines()[-1].removeprefix("let it write: "))
    assert (program, throughtime(*arguments, "--length", 3).code) == ("throughtime", 0)

    refused = throughtime("train", text, "--out", name)
    assert shlex.split(refused.err.split("or go on with ")[1]) == ["--resume", arguments[-1]]

    (tmp_path / name / "results.json").unlink()
    shown = throughtime("info", arguments[-1]).out
    assert shlex.split(" ".join(shown.split("go on with: ")[1].split()))[-1] == arguments[-1]
