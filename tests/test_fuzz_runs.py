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
    result = fuzz_runs.check_altered_runs(tmp_path, 6)
    assert result["failures"] == []
    assert result["calls"] == 60
