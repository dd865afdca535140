import json
import math
from dataclasses import replace

import pytest
import torch

import throughtime
from throughtime import insight
from throughtime.errors import InputError
from throughtime.insight import plots, report


def recorder(cell, names="default", hidden=12, steps=45, layers=1, seed=1):
    def record(dtype):
        torch.manual_seed(seed)
        return report.record_noise(report.make_layer(cell, hidden, layers, names), steps, seed, dtype=dtype)

    return record


def full_report(cell="lstm", layers=2, names="default"):
    lanes = insight.measure(recorder(cell, names, layers=layers)(torch.float32), lags=30, probes=16)
    trials = [
        report.try_start([recorder(c, n, seed=seed) for seed in (1, 2)], c, n, 30)
        for c, n in report.starts_to_try(cell, 30)
    ]
    clip = report.clip_report([0.5, 3.0], 1.0)
    return insight.GradientReport("a", "b", cell, 45, 16, 16, 30, lanes, trials, clip=clip)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
def test_a_report_holds_what_the_instruments_measure(cell):
    recorded = recorder(cell, layers=2, seed=3)(torch.float32)
    below, top = insight.measure(recorded, lags=30, probes=16)
    assert [below.name, top.name] == ["layer 0", "layer 1"]
    lag = insight.lag_matrix(*recorded, lags=30, probes=16)[1]
    assert top.horizons[2] == insight.horizon(lag, 1e-3)
    assert top.curve[0] == 1
    assert len(top.curve) == 30
    assert below.split is None
    assert (top.split is None) == cell.startswith("rnn")  # without a keeping gate nothing goes past W_hh
    assert (top.constants is None) == cell.startswith("rnn")
    assert (top.bound is not None) == cell.startswith("rnn")
    assert top.radius <= top.norm
    record = json.loads(json.dumps(full_report(cell).to_json(), allow_nan=False))
    assert record["verdict"] in ("vanishing", "undecided", "exploding")
    assert len(record["lanes"]) == 2
    assert record["trials"]
    assert record["clip"]["share"] == 0.5


def test_the_top_of_a_bidirectional_stack_is_its_forward_lane():
    layer = throughtime.GRU(8, 6, bidirectional=True)
    lanes = insight.measure(report.record_noise(layer, 20), lags=20, probes=20)
    whole = insight.GradientReport("a", "b", "gru", 20, 8, 20, 20, lanes, [])
    assert whole.top.name == "layer 0"
    assert [lane.name for lane in lanes] == ["layer 0", "layer 0, reverse"]


def test_a_row_of_a_lane_is_that_row():
    x, reset = torch.randn(9, 3, 3, dtype=torch.float64), torch.rand(9, 3) < 0.2
    layer = throughtime.LSTM(3, 4).double()
    (whole,) = insight.record(layer, x, reset=reset).lanes
    (alone,) = insight.record(layer, x[:, 1:2], reset=reset[:, 1:2]).lanes
    row = whole.part(slice(1, 2))
    assert row.batch == 1
    torch.testing.assert_close(insight.jacobians(row), insight.jacobians(alone))


def test_trials_measure_fresh_networks_of_several_seeds():
    trials = full_report("lstm").trials
    assert [trial.init for trial in trials] == ["forget:1", "forget:3", "chrono:30"]
    assert trials[1].at_last_lag > 10 * trials[0].at_last_lag
    assert [len(trial.lags) for trial in trials] == [2, 2, 2]
    assert trials[0].reach.low <= trials[0].reach.lag <= trials[0].reach.high


def trial_of(lag, left=0.0, kinds=("vanishing",), names="forget:1"):
    return report.Trial("lstm", names, [lag], left, list(kinds))


def test_no_advice_reaches_less_than_the_run_or_its_own_start_or_explodes():
    whole = full_report()
    own = whole.top.horizons[-1].lag
    further, less, explodes = trial_of(own + 9), trial_of(own - 1), trial_of(math.inf, 99.0, ["healthy", "exploding"])
    assert replace(whole, trials=[further, less, explodes]).advice == [further]
    assert replace(whole, trials=[further], fresh=trial_of(own + 10)).advice == []


def test_clipping_is_told_of_all_steps():
    clip = report.clip_report([0.5, 3.0], 1.0, share=0.0085, steps=1406)
    assert (clip.share, clip.steps, clip.logged) == (0.0085, 1406, 2)
    assert report.clip_report([0.5, 3.0], 1.0)[:3] == (0.5, 2, 2)


@pytest.mark.parametrize(("gain", "dtype", "step"), [(3, "float32", 107), (30, "float64", 227)])
def test_where_a_float_does_not_hold_the_states_it_is_said_and_measured_as_far_as_one_does(gain, dtype, step):
    """A relu network grows without bound; where its states are infinite relu′ is 0, and every gradient would read 0."""
    record = recorder("rnn_relu", f"orthogonal:{gain}", hidden=64, steps=231)
    measured = insight.measure_finite(record, lags=200, probes=32)
    assert measured.overflow == (dtype, step)
    whole = record(torch.float64).part(steps=slice(step if dtype == "float64" else None))
    lag = insight.lag_matrix(*whole, lags=200, probes=32)[0]
    top = measured.lanes[0]
    torch.testing.assert_close(top.lag.norms, lag.norms)
    assert top.exponents[0] > 0.5
    assert insight.judge(top.curve, top.horizons[-1], overflow=measured.overflow).kind == "exploding"
    tried = report.try_start([record], "rnn_relu", f"orthogonal:{gain}", 200)
    assert tried.kinds == ["exploding"]


def test_gradients_that_float32_does_not_hold_are_measured_in_float64():
    """Losses that send in 1e25 each go past what float32 holds before the state does."""
    plain = recorder("rnn_relu", "orthogonal:2", hidden=32, steps=149, layers=2)

    def record(dtype):
        recording, gradients = plain(dtype)
        return insight.ModelRecording(recording, 1e25 * gradients)

    assert insight.find_overflow(record(torch.float32)) is None
    measured = insight.measure_finite(record, lags=130, probes=20)
    assert measured.overflow is None
    assert measured.recorded.recording.outputs.dtype == torch.float64
    assert all(1e15 < lane.curve[-1] < math.inf for lane in measured.lanes)


def test_weights_that_are_no_numbers_are_refused():
    layer = report.make_layer("rnn", 4)
    torch.nn.init.constant_(layer.weight_hh_l0, math.nan)
    with pytest.raises(InputError, match="the state of step 0 isn't finite, not even in float64"):
        insight.measure_finite(lambda dtype: report.record_noise(layer, 20, dtype=dtype), lags=10, probes=4)


def test_quantiles_are_those_of_what_the_curve_is_the_mean_of():
    (top,) = insight.measure(recorder("gru")(torch.float32), lags=30, probes=16)
    each = top.lag.norms[:, 7].flatten().double()
    for row, share in enumerate((0.1, 0.5, 0.9)):
        wanted = each.quantile(share) / top.lag.curve[0].double()
        assert top.quantiles[row, 7].item() == pytest.approx(wanted.item())
    assert top.quantiles[0, 7] < top.curve[7] < top.quantiles[2, 7]


def test_medians_are_half_way_between_the_middle_two():
    assert report._quantiles(torch.tensor([1.0, 2.0, 4.0, 9.0])) == (1.0, 3.0, 9.0)


def test_the_bias_is_that_of_the_window_and_agreement_is_within_it():
    recorded = recorder("gru")(torch.float32)
    (top,) = insight.measure(recorded, lags=30, probes=16, window=10)
    assert top.window == 10
    assert top.bias == insight.truncation_bias(top.lag.curve, 10)
    (kappa,) = insight.cancellation(*recorded)
    assert top.agreement == pytest.approx(kappa[-10:].quantile(0.5).item(), rel=1e-5)
    assert top.agreement_steps == 10
    (top,) = insight.measure(recorded, lags=30, probes=16, agreement=False)
    assert math.isnan(top.agreement)


def test_agreement_is_over_the_steps_that_were_recorded():
    """A window that is longer than the recording has no losses to agree past its end."""
    recorded = recorder("gru")(torch.float32).part(slice(8))
    (top,) = insight.measure(recorded, lags=30, probes=16, window=1000)
    assert (top.window, top.agreement_steps) == (1000, 45)
    assert top.agreement == pytest.approx(insight.cancellation(*recorded)[0].quantile(0.5).item(), rel=1e-5)


@pytest.mark.parametrize(("window", "rows", "steps"), [(10, 16, 10), (64, 4, 64), (200, 1, 200), (1000, 1, 256)])
def test_what_agreement_costs_does_not_grow_with_the_window(window, rows, steps):
    recorded = recorder("rnn", hidden=4, steps=400)(torch.float32)
    assert report._last_steps(recorded, window).grad_outputs.shape == (steps, rows, 4)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_figure_is_a_png(cell, tmp_path):
    pytest.importorskip("matplotlib")
    plots.draw(full_report(cell), tmp_path / "gradients.png")
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="needs matplotlib, which is not installed; pip install"):
        plots.draw(full_report("rnn"), tmp_path / "gradients.png")


def test_what_can_not_be_is_said():
    with pytest.raises(InputError, match="unknown cell 'lstn'; did you mean 'lstm'"):
        report.make_layer("lstn", 8)
    with pytest.raises(InputError, match="--hidden 0"):
        report.make_layer("lstm", 0)
    with pytest.raises(InputError, match=r"the text has 20 tokens; expected at least 31"):
        report.record_text(torch.nn.Linear(1, 1), torch.arange(20).numpy(), 30)
    assert report.clip_report([], 1.0) is None
    assert report.clip_report([1.0], 0.0) is None
