"""What README and docs/ claim holds: Python runs, commands are ones that exist, links lead somewhere, the site builds."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
BLOCKS = [
    (name, kind, code)
    for name, page in zip(NAMES, PAGES, strict=True)
    for kind, code in FENCE.findall(page.read_text("utf-8"))
]
WHOLE = [
    (name, code.replace("\\\n", "")) for name, kind, code in BLOCKS if kind == "sh"
]  # a command goes on after a backslash
LINES = [(name, line) for name, code in WHOLE for line in code.splitlines() if line.strip()]
PYTHON = {f"{name}-{n}": code for n, (name, kind, code) in enumerate(BLOCKS) if kind == "python"}
LINKS = [(name, target) for name, page in zip(NAMES, PAGES, strict=True)
         for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8")))]  # fmt: skip


TARGETS = sorted({target for page in PAGES for target in re.findall(r"`make ([\w-]+)", page.read_text("utf-8"))})


@pytest.fixture(scope="module")
def beside_a_run(tmp_path_factory):
    """Return a folder in which there is a trained run of the name "run"."""
    from throughtime.lm import TrainingOptions, train

    folder = tmp_path_factory.mktemp("documents")
    (folder / "book.txt").write_text("Once upon a time there was a king.\n" * 40)
    train([folder / "book.txt"], folder / "run", TrainingOptions(hidden=8, steps=3, batch=4, bptt=16))
    return folder


def test_every_block_says_what_it_is():
    """Python is run, sh is checked line by line, text is output or a picture in letters."""
    assert {kind for _, kind, _ in BLOCKS} == {"python", "sh", "text"}
    assert len(PYTHON) > 20
    assert len(LINES) > 40
    assert len(TARGETS) > 5
    assert len(LINKS) > 30


@pytest.mark.parametrize("name", PYTHON)
def test_python_runs(name, beside_a_run, monkeypatch):
    if "onnx" in PYTHON[name]:
        pytest.importorskip("onnxruntime")
    if "open_study" in PYTHON[name]:
        pytest.importorskip("optuna")
    monkeypatch.chdir(beside_a_run)
    exec(compile(PYTHON[name], name, "exec"), {"__name__": "__main__"})


def parse(words: list[str]) -> None:
    """Read a command line of ours as the program does, and stop before it is carried out."""
    from throughtime.app.cli import app

    commands: Any = get_command(app)
    assert words[0] in commands.commands
    commands.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize(("name", "line"), LINES)
def test_commands_exist(name, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    match words:
        case []:
            assert line.startswith("#")
        case ["throughtime", *rest]:
            parse([word for word in rest if word != "…"])
        case ["torchrun" | "srun", *_]:
            assert "torchrun" in words
            parse(words[words.index("throughtime") + 1 :])
        case ["make", *rest]:
            for word in rest:
                assert "=" in word or re.search(rf"^{word}:", (ROOT / "Makefile").read_text("utf-8"), re.M)
        case ["python3", "-m", "venv", folder, "&&", ".", entered]:
            assert entered == f"{folder}/bin/activate"
        case ["python" | ".venv/bin/python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install" | "wheel", *_] | ["cc", *_] | ["git", *_]:
            assert all(
                (ROOT / word).exists() for word in words if word.startswith(("examples/", "benchmarks/", "docs/"))
            )
        case _:
            pytest.fail(f"{name}: nobody knows whether {line!r} works")


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_are_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M)


def anchors_of(page: Path) -> set[str]:
    """Return what the headings of a page are called in links."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("name", "target"), LINKS)
def test_links_lead_somewhere(name, target):
    if target.startswith(("https://", "mailto:")):
        return
    path, _, anchor = target.partition("#")
    page = (ROOT / name).parent / path if path else ROOT / name
    assert page.exists()
    if anchor:
        assert anchor in anchors_of(page)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"?(https?:)?//", page.read_text("utf-8"))
        assert not fetched, page
