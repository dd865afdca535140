"""A short form of benchmarks/fuzz_cli.py: calls that nobody meant."""

from benchmarks.fuzz_cli import fuzz


def test_no_call_crashes_hangs_or_writes_where_it_was_not_told_to():
    outcomes = list(fuzz(calls=60, seed=7))
    assert len(outcomes) == 60
    assert [outcome for outcome in outcomes if outcome.complaint] == []
    assert {outcome.code for outcome in outcomes} >= {0, 2}
