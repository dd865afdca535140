"""A crash costs nothing: the checks of benchmarks/resilience.py, with small counts."""

import importlib.util
import os
from pathlib import Path

import pytest

from throughtime.lm import cell_names

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")

_FILE = Path(__file__).parents[2] / "benchmarks" / "resilience.py"
_spec = importlib.util.spec_from_file_location("resilience", _FILE)
assert _spec is not None
assert _spec.loader is not None
resilience = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(resilience)


@pytest.mark.parametrize("cell", cell_names())
@pytest.mark.parametrize("sequences", [False, True])
def test_a_stop_at_any_step_changes_nothing(cell, sequences):
    assert resilience.check_resume(cell, sequences, 24) == 24


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_file(tmp_path):
    assert resilience.check_random_kills(tmp_path, 20) == 20
    assert resilience.check_kills_at_every_call(tmp_path) == 15


def test_a_full_disk_leaves_what_was_there(tmp_path):
    assert resilience.check_full_disk(tmp_path, 12) == 12


def test_damage_is_refused(tmp_path):
    assert resilience.check_truncation(tmp_path) > 300
    assert resilience.check_bit_flips(tmp_path, 300) == 300


def test_killed_trainings_come_to_the_same_end(tmp_path):
    resilience.check_killed_trainings(tmp_path, 1)
