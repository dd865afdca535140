"""What a lag curve is called: over the steps that are needed, whatever window it was measured in."""

import math

import pytest

from benchmarks import verdicts
from throughtime import insight
from throughtime.insight import Need, Overflow
from throughtime.insight.gradient_flow import Horizon

BEYOND = Horizon(1e-3, math.inf, math.inf, math.inf)


def curve_of(factor, lags=200):
    return [factor**k for k in range(lags)]


def judged(factor, lags=200, need=200):
    curve = curve_of(factor, lags)
    lag = next((float(k) for k, value in enumerate(curve) if value < 1e-3), math.inf)
    return insight.judge(curve, Horizon(1e-3, lag, lag, lag), Need(need))


def test_the_verdict_is_what_the_curve_is():
    assert judged(0.8).sentence == ("vanishing within 200 steps: less than 1/1000 is left beyond lag 31 [31–31]")
    assert judged(1.05).kind == "exploding"
    assert "×1.65e+04 at lag 199" in judged(1.05).sentence
    assert judged(0.99) == ("healthy", "healthy within 200 steps: 0.14 of a loss's gradient is left at lag 199")
    assert "[31–beyond]" in insight.judge(curve_of(0.8), Horizon(1e-3, 31, 31, math.inf)).sentence
    assert "beyond lag 31" in insight.judge(curve_of(0.8), Horizon(1e-3, 31, math.nan, math.nan)).sentence


def test_a_window_too_short_to_tell_is_not_healthy():
    assert judged(0.52, lags=10) == (
        "undecided",
        "undecided within 200 steps: 10 lags are too few to tell; 0.0028 is left at lag 9",
    )
    assert judged(0.52, lags=12).kind == "vanishing"  # 0.52¹¹ is below 1/1000


@pytest.mark.parametrize("factor", [0.98, 0.97, 1.03, 1.01])
def test_a_longer_window_changes_no_verdict(factor):
    """0.98 falls below 1/1000 at lag 342, which 64 steps don't need."""
    wanted = judged(factor, 64, 64).kind
    assert {judged(factor, lags, 64).kind for lags in (64, 65, 200, 400, 1000)} == {wanted}


def test_what_comes_after_the_steps_that_are_needed_is_told():
    assert judged(0.98, 400, 64).sentence == (
        "healthy within 64 steps: 0.28 of a loss's gradient is left at lag 63; 1/1000 at lag 342 [342–342]"
    )
    assert judged(1.01, 400, 64).sentence.endswith("; after them a loss's gradient has grown ×53 at lag 399")


def test_whose_need_it_is_stands_in_the_sentence():
    said = insight.judge(curve_of(0.99), BEYOND, Need(64, "its --bptt")).sentence
    assert said.startswith("healthy within its --bptt of 64: 0.53 of a loss's gradient is left at lag 63")


def test_states_that_overflow_explode_whatever_the_gradient_reads():
    dead = [1.0] + [0.0] * 199
    found = insight.judge(dead, Horizon(1e-3, 1, 1, 1), overflow=Overflow("float32", 107))
    assert found == ("exploding", "exploding: states are too large for float32 from step 107 on")
    grown = insight.judge([1.0, 30.0, math.inf], BEYOND, overflow=Overflow("float64", 3))
    assert grown.sentence.endswith("from step 3 on; a loss's gradient has grown ×30 at lag 1, and on")


def test_what_two_kinds_have_room_in_is_not_decided():
    curve = curve_of(1.01)
    wide, narrow = (([v / f for v in curve], [v * f for v in curve]) for f in (2.0, 1.1))
    assert insight.judge(curve, BEYOND, between=wide) == (
        "undecided",
        "undecided within 200 steps: a loss's gradient has grown ×7.24 at lag 199, between ×3.6 and ×14",
    )
    assert insight.judge(curve, BEYOND, between=narrow).kind == "healthy"
    assert insight.judge(curve_of(1.03), BEYOND, between=([1.0] * 200, [1e9] * 200)).kind == "undecided"
    reach = Horizon(1e-3, 190, 170, math.inf)
    said = insight.judge(curve_of(0.964), reach).sentence
    assert said == "undecided within 200 steps: 1/1000 is left at lag 190 [170–beyond]"
    assert insight.judge(curve_of(0.964), reach, Need(100)).kind == "healthy"
    later = Horizon(1e-3, math.inf, 180, math.inf)
    assert insight.judge(curve_of(0.97), later).sentence.endswith(": 1/1000 is left past them [180–beyond]")


def test_losses_that_send_nothing_are_not_healthy():
    assert insight.judge([math.nan] * 5, BEYOND).sentence == "vanishing: the losses send no gradient into the layer"


def test_networks_of_known_kind_are_called_what_they_are():
    """A short form of the benchmark's table, of forty networks."""
    rows = verdicts.judge_all(verdicts.NETWORKS[3::9], hidden=16, seeds=(1,), windows=(30, 210))
    assert {row.known for row in rows} >= {"vanishing", "exploding", "healthy"}
    assert [row for row in rows if row.is_wrong or row.is_open] == []
