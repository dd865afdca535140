"""A run that is trained longer than was planned: on a schedule of its own, to the bit, and never for the worse."""

import os
import signal
from contextlib import nullcontext

import pytest
import torch

from throughtime import InputError
from throughtime.lm import Run, TrainingOptions, evaluate, open_run, resume, train, training
from throughtime.training import Budget, Ranks
from throughtime.training.checkpoint import load

SMALL = {"hidden": 16, "batch": 4, "bptt": 16, "steps": 20}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. 한글도 됩니다.\n" * 60)
    return path


@pytest.fixture
def run(text, tmp_path):
    train([text], tmp_path / "run", TrainingOptions(**SMALL))
    return tmp_path / "run"


def files(run):
    """What of a run is used: its weights and its results."""
    return {
        name: (run / name).read_bytes() for name in ("model.safetensors", "results.json", "config.json", "config.toml")
    }


def stop_at(step):
    def interrupt(report):
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return interrupt


def test_a_complete_run_is_trained_longer_on_a_new_schedule(run):
    before = open_run(run).results
    reports = []
    summary = resume(run, reports.append, longer=Budget(steps=60))
    assert (summary.steps, reports[0].step, reports[-1].step) == (80, 21, 80)
    assert (reports[0].progress, reports[-1].progress) == (pytest.approx(1 / 60), 1)
    rates = [report.learning_rate for report in reports]
    assert max(rates) == pytest.approx(1e-2, rel=0.01)
    assert rates[-1] < 0.03 * max(rates)
    assert summary.longer.is_better
    assert summary.longer.before == before["held_out"]["nats_per_token"] > summary.longer.after
    opened = open_run(run)
    assert opened.results["held_out"]["nats_per_token"] == summary.longer.after
    found = evaluate(opened.load_model(), opened.corpus().held_out).nats_per_token
    assert found == pytest.approx(summary.longer.after)
    stages = opened.results["training"]["stages"]
    assert [(stage["steps"], stage["nats_per_token"]) for stage in stages] == [
        (20, summary.longer.before),
        (80, summary.longer.after),
    ]
    assert resume(run, longer=Budget(epochs=1)).steps > 80
    assert len(open_run(run).results["training"]["stages"]) == 3


def test_a_time_is_counted_from_where_it_stands(run):
    reports = []
    summary = resume(run, reports.append, longer=Budget(minutes=0.01))
    before = open_run(run).results["training"]["stages"][0]
    assert summary.seconds - before["seconds"] == pytest.approx(0.6, abs=0.3)
    assert reports[0].progress < 0.5
    assert 0 < reports[0].seconds_left < 5


MANNERS = {
    "stream": {"dropout": 0.2},
    "best": {"eval_every": 6, "mode": "sentence"},
    "average": {"ema": 0.9, "level": "word", "eval_every": 5, "patience": 2},
    "nt-asgd": {"optimizer": "nt-asgd", "lr": 30.0, "eval_every": 2, "nonmonotone": 1, "schedule": "constant"},
    "decay": {"lr_decay": 0.5, "cell": "mlp", "schedule": "constant", "optimizer": "sgd", "lr": 0.1},
}


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("step", [21, 30])
def test_what_is_stopped_meanwhile_goes_on_to_the_bit_and_is_what_it_was_until_then(text, tmp_path, manner, step):
    options = TrainingOptions(**SMALL | MANNERS[manner])
    for name in ("whole", "cut"):
        train([text], tmp_path / name, options)
    whole = resume(tmp_path / "whole", longer=Budget(steps=25))
    before = files(tmp_path / "cut")
    step = open_run(tmp_path / "cut").results["training"]["steps"] + step - 20
    stopped = resume(tmp_path / "cut", stop_at(step), longer=Budget(steps=25))
    assert stopped.interrupted
    assert files(tmp_path / "cut") == before
    again = resume(tmp_path / "cut")
    assert (again.steps, again.longer, again.evaluation) == (whole.steps, whole.longer, whole.evaluation)
    for name in ("checkpoint/latest.safetensors", "model.safetensors"):
        expected, _ = load(tmp_path / "whole" / name)
        actual, _ = load(tmp_path / "cut" / name)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[tensor], expected[tensor]) for tensor in expected)
    assert not (tmp_path / "cut" / "checkpoint" / "best.safetensors").exists()
    with pytest.raises(InputError, match=r"is complete.*longer.*--minutes"):
        resume(tmp_path / "cut")


@pytest.mark.parametrize("manner", [{}, {"eval_every": 5}])
def test_a_run_that_would_get_worse_keeps_its_weights_and_says_so(text, tmp_path, manner):
    options = TrainingOptions(**SMALL | {"steps": 60, "rollbacks": 0} | manner)
    train([text], tmp_path / "run", options)
    before, results = files(tmp_path / "run"), open_run(tmp_path / "run").results
    summary = resume(tmp_path / "run", longer=Budget(steps=4), learning_rate=1.0)
    assert not summary.longer.is_better
    assert summary.longer.after > summary.longer.before == results["held_out"]["nats_per_token"]
    after = open_run(tmp_path / "run").results
    assert after["held_out"] == results["held_out"]
    assert after["training"]["steps"] == 64
    assert after["training"]["best_step"] == (results["training"]["best_step"] or 60) == summary.best_step
    assert files(tmp_path / "run")["model.safetensors"] == before["model.safetensors"]
    assert evaluate(
        open_run(tmp_path / "run").load_model(last=True), open_run(tmp_path / "run").corpus().held_out
    ).nats_per_token > summary.evaluation.nats_per_token  # fmt: skip


def test_patience_begins_anew(text, tmp_path):
    text.write_text("abcdefgh" * 300 + "hgfedcba" * 300 + "aaaabbbb" * 300)
    options = TrainingOptions(**SMALL | {"steps": 400, "eval_every": 10, "patience": 3, "split": 0.5, "lr": 0.02})
    first = train([text], tmp_path / "run", options)
    assert first.stopped_early
    second = resume(tmp_path / "run", longer=Budget(steps=200))
    assert first.steps + 30 <= second.steps < first.steps + 200
    assert second.stopped_early


def test_a_run_that_was_stopped_may_go_on_for_another_time_than_was_planned(text, tmp_path):
    train([text], tmp_path / "run", TrainingOptions(**SMALL), stop_at(7))
    steps = load(tmp_path / "run" / "checkpoint" / "latest.safetensors")[1]["step"]
    summary = resume(tmp_path / "run", longer=Budget(steps=30))
    assert summary.steps == steps + 30
    assert summary.longer is None
    assert open_run(tmp_path / "run").results["training"]["steps"] == steps + 30


def test_a_crash_between_the_weights_and_the_results_is_made_good(run, monkeypatch):
    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save_results", crash)
        with pytest.raises(KeyboardInterrupt):
            resume(run, longer=Budget(steps=60))
    summary = resume(run)
    assert summary.longer.is_better
    assert open_run(run).results["held_out"]["nats_per_token"] == summary.longer.after


def test_a_rate_that_rises_again_is_no_divergence(text, tmp_path):
    """A small text is known by heart: any higher loss is far above the lowest there was."""
    text.write_text("abcd" * 600)
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 300, "lr": 0.02}))
    summary = resume(tmp_path / "run", longer=Budget(steps=60), learning_rate=0.3)
    assert summary.rollbacks == 0


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(run, rate):
    with pytest.raises(InputError, match=r"lr = .*expected a number above 0"):
        resume(run, longer=Budget(steps=5), learning_rate=rate)


@pytest.mark.parametrize(("batch", "size", "expected"), [(4, 3, "2 or 4"), (2, 4, "2"), (12, 5, "4 or 6")])
def test_a_run_goes_on_in_a_number_of_processes_that_divides_its_batch(
    text, tmp_path, monkeypatch, batch, size, expected
):
    train([text], tmp_path / "run", TrainingOptions(hidden=2, batch=batch, bptt=4, steps=2))
    monkeypatch.setattr(training, "joined", lambda: nullcontext(Ranks(0, size)))
    monkeypatch.setattr(Ranks, "of_first", lambda ranks, make: make())
    with pytest.raises(InputError) as caught:
        resume(tmp_path / "run", longer=Budget(steps=2))
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: its batch has {batch} rows, which can't be divided among {size} processes; expected a number of "
        f"processes such as {expected}"
    )
