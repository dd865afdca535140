import json
import math

import pytest
import torch

import throughtime
from throughtime import insight
from throughtime.errors import InputError
from throughtime.insight import plots, report
from throughtime.insight.gradient_flow import Horizon


def curve_of(factor, lags=100):
    return [factor**k for k in range(lags)]


def test_the_verdict_is_what_the_curve_is():
    vanishing = insight.judge(curve_of(0.8), Horizon(1e-3, 31, 30, 33))
    assert vanishing.kind == "vanishing"
    assert "beyond lag 31 [30–33]" in vanishing.sentence
    exploding = insight.judge(curve_of(1.05), Horizon(1e-3, math.inf, math.inf, math.inf))
    assert exploding.kind == "exploding"
    assert "×125 at lag 99" in exploding.sentence
    healthy = insight.judge(curve_of(0.99), Horizon(1e-3, math.inf, math.inf, math.inf))
    assert healthy == ("healthy", "healthy: at lag 99, 0.37 of a loss's gradient is left")
    assert "[31–beyond]" in insight.judge(curve_of(0.8), Horizon(1e-3, 31, 31, math.inf)).sentence


def full_report(cell="lstm", layers=2, names="default"):
    lanes = insight.measure(report.record_noise(report.make_layer(cell, 12, layers, names), 45), lags=30, probes=16)
    trials = report.try_starts(
        lambda c, n: report.record_noise(report.make_layer(c, 12, 1, n), 45), report.starts_to_try(cell, 30), 30
    )
    clip = report.clip_report([0.5, 3.0], 1.0)
    return insight.GradientReport("a", "b", cell, 45, 8, 16, 30, lanes, trials, clip)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
def test_a_report_holds_what_the_instruments_measure(cell):
    torch.manual_seed(3)
    recorded = report.record_noise(report.make_layer(cell, 12, 2), 45)
    below, top = insight.measure(recorded, lags=30, probes=16)
    assert [below.name, top.name] == ["layer 0", "layer 1"]
    lag = insight.lag_matrix(*recorded, lags=30, probes=16)[1]
    assert top.horizons[2] == insight.horizon(lag, 1e-3)
    assert top.curve[0] == 1
    assert len(top.curve) == 30
    assert below.split is None
    assert top.split is not None
    assert (top.constants is None) == cell.startswith("rnn")
    assert (top.bound is not None) == cell.startswith("rnn")
    assert top.radius <= top.norm
    record = json.loads(json.dumps(full_report(cell).to_json(), allow_nan=False))
    assert record["verdict"] in ("vanishing", "healthy", "exploding")
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
    row = whole.row(1)
    assert row.batch == 1
    torch.testing.assert_close(insight.jacobians(row), insight.jacobians(alone))


def test_trials_measure_a_fresh_network():
    trials = full_report("lstm").trials
    assert [trial.init for trial in trials] == ["forget:1", "forget:3", "chrono:30"]
    assert trials[1].at_last_lag > 100 * trials[0].at_last_lag


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
