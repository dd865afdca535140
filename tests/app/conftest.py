import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from throughtime.app.cli import main


@dataclass
class Ended:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        return json.loads(self.out)


@pytest.fixture
def throughtime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Call the program in this process."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("THROUGHTIME_TRACEBACK", raising=False)

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is learned quickly."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return path


SMALL = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)


@pytest.fixture(scope="session")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "fox"
    assert main(["train", str(text), "--out", str(folder), *map(str, SMALL)]) == 0
    return folder
