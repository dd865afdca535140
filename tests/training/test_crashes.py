"""A crash costs nothing, and a damaged, trapped or forged run is refused: benchmarks/resilience.py, with small counts."""

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


def test_a_flipped_bit_in_any_file_of_a_run_is_refused_or_an_edit(tmp_path):
    kept = resilience.check_bit_flips_in_runs(tmp_path, 12)
    assert kept.keys() == resilience.READERS.keys()
    assert all(kept[name] == 12 for name in kept.keys() - set(resilience.EDITABLE))


def test_links_in_place_of_a_runs_files_lead_nowhere(tmp_path):
    assert resilience.check_links_in_runs(tmp_path) == 30


def test_nothing_is_changed_under_another_name(tmp_path):
    assert resilience.check_other_names_of_runs(tmp_path) == len(resilience.READERS)


def test_of_two_writers_one_is_refused_and_the_others_run_is_whole(tmp_path):
    assert resilience.check_two_writers(tmp_path, 4) == 4


def test_forged_states_are_refused_and_crash_nothing(tmp_path):
    assert resilience.check_forged_states(tmp_path, 10) == dict.fromkeys(resilience.OPTIMIZERS, 10)
