"""README and SECURITY.md are maps: what they point to is there, every example runs, every command is one that exists."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert match, f"README has no section {title!r}"
    return match[1]


ROWS = [line.split("|") for line in section("Where is…?").splitlines() if line.startswith("| ")]
PLACES = [place for row in ROWS for place in re.findall(r"`([^`]+)`", row[2])]
PROMISES = re.findall(r"^\| \*\*.*\| (`.*`) \|$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.M)
PROOFS = [place for shown in PROMISES for place in re.findall(r"`([^`]+)`", shown)]
LAYOUT = re.findall(r"^([\w./]+)\s{2,}", section("Layout"), re.M)


@pytest.mark.parametrize("place", PLACES + PROOFS)
def test_where_is_resolves(place):
    """A place is a path, or a dotted name under throughtime."""
    if "/" in place or place in {"Makefile", "pyproject.toml", "SECURITY.md"}:
        path, _, name = place.partition(":")
        assert (ROOT / path).exists()
        if name:
            assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.M)
        return
    module, _, name = place.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_the_table_and_the_layout_are_not_empty():
    assert len(PLACES) > 10
    assert len(LAYOUT) > 8
    assert len(PROMISES) == 7


@pytest.mark.parametrize("path", LAYOUT)
def test_the_layout_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_examples_run(code, tmp_path):
    """They run beside a trained run of the name "run"."""
    from throughtime.lm import TrainingOptions, train

    (tmp_path / "book.txt").write_text("Once upon a time there was a king.\n" * 40)
    train([tmp_path / "book.txt"], tmp_path / "run", TrainingOptions(hidden=8, steps=3, batch=4, bptt=16))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_commands_are_known(capsys):
    from throughtime.app.cli import main

    commands = set(
        re.findall(r"^throughtime ([\w-]+)", "\n".join(re.findall(r"```(?:sh|text)?\n(.*?)```", README, re.S)), re.M)
    )
    assert {"train", "eval", "sample", "explain", "info"} <= commands
    for command in commands:
        assert main([command, "--help"]) == 0


@pytest.mark.parametrize("target", re.findall(r"make (\w+)", README))
def test_make_targets_are_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
