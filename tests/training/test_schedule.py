"""Budgets and the learning rate along them."""

import pytest

from throughtime import InputError
from throughtime.training import Budget, Schedule


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_rate_rises_then_falls(shape):
    schedule = Schedule(shape, warmup=0.1, final=0.05)
    factors = [schedule.factor(p / 100) for p in range(101)]
    assert factors[0] == 0
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.525)
    assert factors[100] == factors[-1] == pytest.approx(0.05)
    assert Schedule(shape, warmup=0).factor(0) == 1


def test_the_rate_decays_by_epochs():
    """Zaremba et al.'s small model: four epochs at the full rate, then half as much in each."""
    schedule = Schedule("constant", warmup=0.0, decay=0.5, decay_after=4)
    rates = [schedule.factor(epoch / 13, epoch) for epoch in range(13)]
    assert rates == [1, 1, 1, 1, *(0.5**n for n in range(1, 10))]
    assert schedule.factor(0.4, 5.99) == schedule.factor(0.4, 5.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": "cosinus"}, "unknown schedule 'cosinus'; did you mean 'cosine'"),
        ({"warmup": 1.0}, "warmup = 1.0: expected a share"),
        ({"final": -0.1}, "final = -0.1: expected a share"),
        ({"decay": 0.0}, "decay = 0.0: expected a factor"),
        ({"decay": 1.5}, "decay = 1.5: expected a factor"),
        ({"decay_after": -1.0}, "decay_after = -1.0: expected a number of epochs"),
    ],
)
def test_impossible_schedules(given, message):
    with pytest.raises(InputError, match=message):
        Schedule(**given)


def test_progress_of_each_kind():
    assert Budget(minutes=2).progress(seconds=30, step=999, steps_per_epoch=1) == 0.25
    assert Budget(steps=10).progress(seconds=0, step=5, steps_per_epoch=1) == 0.5
    assert Budget(epochs=2.5).progress(seconds=0, step=5, steps_per_epoch=4) == 0.5
    assert Budget(epochs=0.001).total_steps(4) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a budget of none: expected exactly one"),
        ({"minutes": 1, "steps": 5}, "a budget of minutes and steps: expected exactly one"),
        ({"epochs": 0}, "epochs = 0: expected a number above 0"),
        ({"minutes": float("nan")}, "minutes = nan: expected a number above 0"),
    ],
)
def test_impossible_budgets(given, message):
    with pytest.raises(InputError, match=message):
        Budget(**given)
