"""README and SECURITY.md are maps: what they point to is there."""

import importlib
import re
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
    if "/" in place or place in {"Makefile", "mkdocs.yml", "pyproject.toml", "SECURITY.md"}:
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
