"""Budgets and the learning rate along them."""

import pytest

from throughtime import InputError
from throughtime.training import Budget, warmup_cosine


def test_the_rate_rises_then_falls():
    factors = [warmup_cosine(p / 100, warmup=0.1, final=0.05) for p in range(101)]
    assert factors[0] == 0
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.05)
    assert warmup_cosine(0, warmup=0) == 1


def test_progress_of_each_kind():
    assert Budget(minutes=2).progress(seconds=30, step=999, steps_per_epoch=1) == 0.25
    assert Budget(steps=10).progress(seconds=0, step=5, steps_per_epoch=1) == 0.5
    assert Budget(epochs=2.5).progress(seconds=0, step=5, steps_per_epoch=4) == 0.5
    assert Budget(epochs=0.001).total_steps(4) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a budget of none: expected exactly one"),
        ({"minutes": 1, "steps": 5}, "a budget of --minutes and --steps: expected exactly one"),
        ({"epochs": 0}, "--epochs 0: expected a number above 0"),
        ({"minutes": float("nan")}, "--minutes nan: expected a number above 0"),
    ],
)
def test_impossible_budgets(given, message):
    with pytest.raises(InputError, match=message):
        Budget(**given)
