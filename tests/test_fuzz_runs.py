"""Altered runs are answered by every command: benchmarks/fuzz_runs.py, with a small count."""

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs commands in processes that it forks")

_spec = importlib.util.spec_from_file_location("fuzz_runs", Path(__file__).parents[1] / "benchmarks" / "fuzz_runs.py")
assert _spec is not None
assert _spec.loader is not None
fuzz_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz_runs)


def test_altered_runs_end_no_command_in_a_way_that_isnt_allowed(tmp_path):
    result = fuzz_runs.check_altered_runs(tmp_path, range(6))
    assert result["failures"] == []
    assert result["calls"] == 6 * len(fuzz_runs.COMMANDS)


def _hang(_):
    while True:
        pass


@pytest.mark.parametrize(
    ("wrong_command", "reason"),
    [
        (lambda _: os.kill(os.getpid(), 9), "exit code -9"),
        (lambda _: 1 / 0, "exit code 1"),
        (lambda _: 1, "exit code 1"),
        (lambda _: os.write(1, b"Traceback (most recent call last)") and 0, "Traceback"),
        (lambda _: os.write(2, b"\x1b[31m") and 0, "a raw control character"),
        (lambda words: (Path(words[1]).parent / "outside" / "nothing").write_text("") or 0, "something outside"),
        (_hang, "longer than"),
    ],
)
def test_what_is_not_allowed_is_seen(tmp_path, monkeypatch, wrong_command, reason):
    program, folder = fuzz_runs.throughtime, tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setattr(fuzz_runs, "COMMANDS", {name: fuzz_runs.COMMANDS[name] for name in ("info", "pack", "score")})
    monkeypatch.setattr(fuzz_runs, "LONGEST", 1)
    monkeypatch.setattr(fuzz_runs, "make_runs", lambda _: [_an_empty_run(folder)] * 2)
    monkeypatch.setattr(fuzz_runs, "alter", lambda *_: "nothing")
    monkeypatch.setattr(fuzz_runs, "warm_up", lambda *_: None)
    monkeypatch.setattr(fuzz_runs, "throughtime", lambda w: wrong_command(w) if w[0] == "pack" else program(w))
    result = fuzz_runs.check_altered_runs(folder, [0], say=lambda _: None)
    assert result["calls"] == 3
    assert any(f": pack: {reason}" in failure for failure in result["failures"])


def _an_empty_run(folder):
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("text")
    return folder / "empty"
