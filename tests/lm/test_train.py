"""From files to a run and back: training, results, resume to the bit, and what is said when something can't be."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboardX.proto import event_pb2

import throughtime
from throughtime import InputError
from throughtime.lm import (
    LanguageModel,
    ModelConfig,
    TrainingOptions,
    evaluate,
    for_minutes,
    generate,
    open_run,
    resume,
    train,
)
from throughtime.lm.run import Run
from throughtime.lm.stored_tokens import StoredTokens
from throughtime.training import Budget, LostRankError, NonFiniteError
from throughtime.training.checkpoint import load

SMALL = {"hidden": 16, "batch": 4, "bptt": 16, "steps": 30}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. 한글도 됩니다.\n" * 60)
    return path


def test_a_run_holds_all_that_it_promises(text, tmp_path):
    reports = []
    summary = train([text], tmp_path / "run", TrainingOptions(**SMALL), reports.append)
    run = open_run(tmp_path / "run")
    assert {entry.name for entry in run.folder.iterdir()} == {
        "config.json",
        "config.toml",
        "tokenizer.json",
        "model.safetensors",
        "generation_config.json",
        "results.json",
        "metrics.jsonl",
        "data",
        "checkpoint",
    }
    assert not summary.interrupted
    assert summary.steps == 30 == reports[-1].step
    assert run.options["hidden"] == 16
    assert run.results["held_out"]["nats_per_token"] == summary.evaluation.nats_per_token
    corpus = run.corpus()
    assert evaluate(run.load_model(), corpus.held_out).nats_per_token == pytest.approx(
        summary.evaluation.nats_per_token
    )
    assert summary.evaluation.bits_per_byte < summary.evaluation.bits_per_character
    first, *_, last = run.metrics()
    assert (first["step"], last["step"]) == (1, 30)
    assert {"loss", "gradient_norm", "clipped", "clip_share", "learning_rate"} <= last.keys()
    assert last["bits_per_character"] == pytest.approx(last["loss"] / math.log(2))
    assert len("".join(generate(run.load_model(), run.tokenizer, "the", 20, seed=1))) == 20


def test_it_learns_the_text(text, tmp_path):
    summary = train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 250, "hidden": 32}))
    assert summary.evaluation.perplexity < 2


@pytest.mark.parametrize("options", [{"level": "byte"}, {"embedding": 8, "tied": True, "layers": 2, "dropout": 0.2}])
@pytest.mark.parametrize("cell", ["rnn", "gru"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_options_train(text, tmp_path, options, cell, optimizer):
    options = SMALL | {"steps": 3, "cell": cell, "optimizer": optimizer, "clip_value": 0.1, **options}
    summary = train([text], tmp_path / "run", TrainingOptions(**options))
    assert math.isfinite(summary.evaluation.nats_per_token)


def test_weights_may_start_uniformly(text, tmp_path):
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1, "init_range": 0.05, "lr": 1e-9}))
    weights, _ = load(tmp_path / "run" / "model.safetensors")
    assert all(0 < tensor.abs().max() <= 0.05 + 1e-6 for tensor in weights.values())
    assert weights["recurrent.weight_hh_l0"].std() == pytest.approx(0.05 / 3**0.5, rel=0.1)


MANNERS = {
    "stream": {"dropout": 0.2},
    "bfloat16": {"dropout": 0.2, "dtype": "bfloat16", "schedule": "linear", "lr_decay": 0.9},
    "nt-asgd": {"optimizer": "nt-asgd", "lr": 30.0, "eval_every": 2, "nonmonotone": 1, "schedule": "constant"},
    "sentence": {"mode": "sentence", "dropout": 0.2, "bptt": 20, "eval_every": 7},
    "words": {"level": "word", "batch": 2, "bptt": 8, "ema": 0.9, "layers": 2, "dropout": 0.3, "locked": True},
    "bpe": {
        "level": "bpe",
        "vocabulary": 280,
        "embedding_dropout": 0.2,
        "optimizer": "sgd",
        "lr": 0.1,
        "eval_every": 5,
    },
}


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru", "mlp"])
@pytest.mark.parametrize("manner", MANNERS)
def test_interrupted_and_resumed_equals_uninterrupted(text, tmp_path, cell, manner):
    options = TrainingOptions(**SMALL | {"cell": cell} | MANNERS[manner])
    whole = train([text], tmp_path / "whole", options)

    def interrupt(report):
        if report.step == 11:
            os.kill(os.getpid(), signal.SIGINT)

    cut = train([text], tmp_path / "cut", options, interrupt)
    assert cut.interrupted
    assert cut.evaluation is None
    assert cut.steps in (11, 12)
    assert open_run(tmp_path / "cut").results is None
    again = resume(tmp_path / "cut")
    assert again.steps == whole.steps
    assert again.evaluation == whole.evaluation
    expected, _ = load(tmp_path / "whole" / "checkpoint" / "latest.safetensors")
    actual, _ = load(tmp_path / "cut" / "checkpoint" / "latest.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    weights, _ = load(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load(tmp_path / "cut" / "model.safetensors")[0].items():
        assert torch.equal(weights[name], tensor), name


def test_the_best_weights_are_the_runs_and_the_last_are_there_too(text, tmp_path):
    """Trained on one part of a text until it forgets all else: the best come early."""
    text.write_text("abcdefgh" * 300 + "hgfedcba" * 300 + "aaaabbbb" * 300)
    options = TrainingOptions(**SMALL | {"steps": 400, "eval_every": 10, "patience": 8, "split": 0.5, "lr": 0.02})
    summary = train([text], tmp_path / "run", options)
    run = open_run(tmp_path / "run")
    assert summary.stopped_early
    assert summary.steps == summary.best_step + 80 < 400
    assert run.results["training"]["best_step"] == summary.best_step
    measured = [m for m in run.metrics() if m.get("event") == "validation"]
    assert [m["step"] for m in measured] == list(range(10, summary.steps + 1, 10))
    assert [m["step"] for m in measured if m["is_best"]][-1] == summary.best_step
    held_out = run.corpus().held_out
    best, last = (evaluate(run.load_model(last=last), held_out).nats_per_token for last in (False, True))
    assert best == pytest.approx(summary.evaluation.nats_per_token)
    assert best < last
    with pytest.raises(InputError, match="this run is complete"):
        resume(tmp_path / "run")


def test_the_averaged_weights_are_the_runs(text, tmp_path):
    summary = train([text], tmp_path / "run", TrainingOptions(**SMALL | {"ema": 0.95}))
    run = open_run(tmp_path / "run")
    saved, _ = load(run.folder / "checkpoint" / "latest.safetensors")
    weights = run.load_model().state_dict()["output.weight"]
    assert torch.equal(weights, saved["average.module.output.weight"])
    assert not torch.equal(weights, saved["model.output.weight"])
    assert torch.equal(weights, run.load_model(last=True).state_dict()["output.weight"])
    assert evaluate(run.load_model(), run.corpus().held_out).nats_per_token == pytest.approx(
        summary.evaluation.nats_per_token
    )


def test_a_divergence_is_rolled_back_said_and_written_down(text, tmp_path, monkeypatch):
    honest = LanguageModel.loss
    calls = []

    def spoilt(model, h, targets):
        calls.append(1)
        return honest(model, h, targets) * (math.nan if len(calls) == 12 else 1)

    monkeypatch.setattr(LanguageModel, "loss", spoilt)
    happened = []
    summary = train([text], tmp_path / "run", TrainingOptions(**SMALL), on_event=happened.append)
    assert (summary.rollbacks, summary.steps) == (1, 30)
    assert (happened[0].step, happened[0].to_step, happened[0].learning_rate) == (12, 0, 0.005)
    events = [m for m in open_run(tmp_path / "run").metrics() if "event" in m]
    assert [(e["event"], e["step"]) for e in events] == [("rollback", 12)]


def test_a_run_that_is_done_or_never_began_cant_go_on(text, tmp_path):
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 2}))
    with pytest.raises(InputError, match="this run is complete"):
        resume(tmp_path / "run")
    with pytest.raises(InputError, match=r"is not empty; .*, or go on with --resume"):
        train([text], tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / "latest.safetensors").unlink()
    with pytest.raises(InputError, match="no checkpoint was written yet"):
        resume(tmp_path / "run")
    with pytest.raises(InputError, match=r"give another --out$"):  # what can't go on isn't advised to
        train([text], tmp_path / "run")


def test_a_run_that_was_stopped_while_it_was_evaluated_is_evaluated_on_resume(text, tmp_path):
    summary = train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 2}))
    (tmp_path / "run" / "results.json").unlink()
    assert resume(tmp_path / "run").evaluation == summary.evaluation
    assert open_run(tmp_path / "run").results is not None


def test_a_model_that_cant_be_made_leaves_no_run(text, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("throughtime.lm.model._make_recurrent", fail)
    with pytest.raises(RuntimeError):
        train([text], tmp_path / "run", TrainingOptions(**SMALL))
    monkeypatch.undo()
    assert train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1})).steps == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, LostRankError("is gone")])
def test_a_run_that_was_never_saved_leaves_its_folder_free(text, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save_checkpoint", fail)
        with pytest.raises(error if isinstance(error, type) else LostRankError) as caught:
            train([text], tmp_path / "run", TrainingOptions(**SMALL))
    assert "go on with" not in str(caught.value)
    assert [entry.name for entry in (tmp_path / "run").iterdir() if not entry.name.startswith(".")] == ["data"]
    assert train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1})).steps == 1


def test_a_lost_process_is_no_reason_to_remove_weights(text, tmp_path):
    def lose(report):
        if report.step == 2:
            shutil.rmtree(tmp_path / "run/checkpoint")
            raise LostRankError("is gone")

    with pytest.raises(LostRankError, match="nothing was saved yet"):
        train([text], tmp_path / "run", TrainingOptions(**SMALL), lose)
    assert open_run(tmp_path / "run").load_model() is not None


def test_a_first_loss_that_is_no_number_leaves_the_start_to_go_back_to(text, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "loss", lambda model, h, targets: h.sum() * math.nan)
    with pytest.raises(NonFiniteError, match="at step 1"):
        train([text], tmp_path / "run", TrainingOptions(**SMALL))
    assert load(tmp_path / "run" / "checkpoint" / "latest.safetensors")[1]["step"] == 0


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch):
    monkeypatch.setattr(throughtime.training.Loop.run, "__defaults__", (None, None, 0.0, None))  # save after every step
    honest = LanguageModel.loss
    calls = []

    def spoilt(model, h, targets):
        calls.append(1)
        return honest(model, h, targets) * (math.inf if len(calls) == 6 else 1)

    monkeypatch.setattr(LanguageModel, "loss", spoilt)
    with pytest.raises(NonFiniteError, match=r"the loss became inf at step 6.*: --lr, --clip"):
        train([text], tmp_path / "run", TrainingOptions(**SMALL | {"rollbacks": 0}))
    monkeypatch.undo()
    _, state = load(tmp_path / "run" / "checkpoint" / "latest.safetensors")
    assert state["step"] == 5
    assert resume(tmp_path / "run").steps == 30


def test_the_encoded_text_of_an_earlier_run_is_used_again(text, tmp_path):
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1}))
    from throughtime.lm.run import clear_run

    clear_run(tmp_path / "run")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["data"]
    before = (tmp_path / "run" / "data" / "tokens.bin").stat().st_mtime_ns
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1}))
    assert (tmp_path / "run" / "data" / "tokens.bin").stat().st_mtime_ns == before


def test_an_output_folder_that_holds_something_is_left_alone(text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty; nothing is overwritten, give another --out"):
        train([text], out, TrainingOptions(**SMALL))
    assert [entry.name for entry in out.iterdir()] == ["precious.txt"]
    with pytest.raises(InputError, match="a file of this name exists"):
        train([text], out / "precious.txt", TrainingOptions(**SMALL))
    with pytest.raises(InputError, match="can't be written: Not a directory"):
        train([text], out / "precious.txt" / "run", TrainingOptions(**SMALL))


def test_too_little_text_for_a_window(tmp_path):
    (tmp_path / "short.txt").write_text("short text")
    with pytest.raises(
        InputError, match=r"8 tokens .* a batch of 4 windows of 16 steps needs at least 65; lower --batch or --bptt"
    ):
        train([tmp_path / "short.txt"], tmp_path / "run", TrainingOptions(**SMALL))


OPTIONS = [
    ({"level": "wrod"}, "unknown level 'wrod'; did you mean 'word'"),
    ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
    ({"cell": "gur"}, "unknown cell 'gur'; did you mean 'gru'"),
    ({"hidden": 0}, "hidden = 0: expected"),
    ({"batch": 0}, "batch = 0: expected a whole number, at least 1"),
    ({"bptt": -3}, "bptt = -3: expected a whole number, at least 1"),
    ({"lr": 0.0}, "lr = 0.0: expected"),
    ({"lr": math.nan}, "lr = nan: expected"),
    ({"weight_decay": -1.0}, "weight_decay = -1.0: expected"),
    ({"warmup": 1.0}, "warmup = 1.0: expected a share"),
    ({"final_lr": 1.0}, "final_lr = 1.0: expected a share"),
    ({"schedule": "linaer"}, "unknown schedule 'linaer'; did you mean 'linear'"),
    ({"lr_decay": 0.0}, "lr_decay = 0.0: expected a factor"),
    ({"lr_decay_after": -1.0}, "lr_decay_after = -1.0: expected a number of epochs"),
    ({"dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
    ({"momentum": 1.0}, "momentum = 1.0: expected a share"),
    ({"init_range": -0.1}, "init_range = -0.1: expected a number above 0"),
    ({"optimizer": "nt-asgd"}, "--optimizer nt-asgd averages from where .*; expected --eval-every"),
    ({"optimizer": "nt-asgd", "eval_every": 5, "ema": 0.9}, "and no --ema"),
    ({"optimizer": "nt-asgd", "eval_every": 5, "nonmonotone": 0}, "--nonmonotone of at least 1"),
    ({"split": 1.5}, "split = 1.5: expected a share"),
    ({"steps": 0}, "steps = 0: expected"),
    ({"minutes": -1.0}, "minutes = -1.0: expected"),
    ({"steps": 5, "epochs": 1.0}, "--epochs and --steps: expected exactly one"),
    ({"clip": -1.0}, "clip = -1.0: expected"),
    ({"dropout": 1.0}, "dropout = 1.0: expected"),
    ({"weight_drop": 1.0}, "weight_drop = 1.0: expected a probability"),
    ({"weight_drop": 0.1, "cell": "mlp"}, "--weight-drop is for recurrent layers, and --cell mlp has none"),
    ({"layer_norm": True, "cell": "mlp"}, "--layer-norm is for recurrent layers"),
    ({"zoneout": 0.1, "gradients_every": 5}, "--gradients-every can't look into layers with --zoneout"),
    ({"zoneout": 1.0}, "zoneout = 1.0: expected a probability"),
    ({"recurrent_dropout": -0.1}, "recurrent_dropout = -0.1: expected a probability"),
    ({"ar": -1.0}, "ar = -1.0: expected a weight of 0 or more"),
    ({"tar": math.inf}, "tar = inf: expected a weight of 0 or more"),
    ({"ema": 1.0}, "ema = 1.0: expected a share"),
    ({"eval_every": -1}, "eval_every = -1: expected"),
    ({"patience": 3}, "--patience needs measurements to lose it over; add --eval-every"),
    ({"rollbacks": -1}, "rollbacks = -1: expected"),
    ({"mode": "streams"}, "unknown mode 'streams'; did you mean 'stream'"),
    ({"sequence": "lines"}, "unknown sequence 'lines'; did you mean 'line'"),
    ({"vocabulary": 100}, "--vocabulary is for --level word and bpe"),
    ({"window": 0, "cell": "mlp"}, "window = 0: expected"),
    ({"seed": 2**63}, "seed = 9223372036854775808: expected a whole number"),
]


@pytest.mark.parametrize(("values", "message"), OPTIONS)
def test_options_out_of_range(values, message):
    with pytest.raises(InputError, match=message):
        TrainingOptions(**values)


def test_three_minutes_unless_something_is_said():
    assert TrainingOptions().budget.minutes == 3
    assert TrainingOptions(steps=7).budget.minutes is None


def test_options_from_toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('cell = "gru"\nhidden = 32\nlr = 1\nsteps = 10\n')
    assert TrainingOptions.from_toml(path) == TrainingOptions(cell="gru", hidden=32, lr=1, steps=10)
    overridden = TrainingOptions.from_toml(path, {"hidden": 64, "epochs": 2.0})
    assert overridden == TrainingOptions(cell="gru", hidden=64, lr=1, epochs=2.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hiden = 3", r"a\.toml: unknown option 'hiden'; did you mean 'hidden'"),
        ("hidden = 3.5", r"a\.toml: hidden = 3.5: expected a whole number"),
        ("hidden = true", "expected a whole number"),
        ('lr = "fast"', "lr = 'fast': expected a number"),
        ("cell = 3", "cell = 3: expected text"),
        ("tied = 1", "tied = 1: expected true or false"),
        ("hidden = ", r"a\.toml: not TOML"),
        ("hidden = 0", "hidden = 0: expected"),
    ],
)
def test_toml_that_wont_do(tmp_path, content, message):
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        TrainingOptions.from_toml(path)
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        TrainingOptions.from_toml(tmp_path / "none.toml")


def test_the_same_seed_gives_the_same_model(text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train([text], tmp_path / name, TrainingOptions(**SMALL | {"steps": 4, "seed": seed, "dropout": 0.3}))
    a, b, c = (load(tmp_path / name / "model.safetensors")[0]["output.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_metrics_survive_a_cut_off_line(text, tmp_path):
    def interrupt(report):
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 3}), interrupt)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [m["step"] for m in open_run(tmp_path / "run").metrics()] == [1]
    resume(tmp_path / "run")
    assert [m["step"] for m in open_run(tmp_path / "run").metrics()] == [1, 2, 3]


def test_byte_level_counts_characters(tmp_path):
    (tmp_path / "k.txt").write_text("가나다라마바사아자차카타파하" * 50)
    summary = train([tmp_path / "k.txt"], tmp_path / "run", TrainingOptions(**SMALL | {"level": "byte"}))
    evaluation = summary.evaluation
    assert evaluation.bits_per_byte == pytest.approx(evaluation.nats_per_token / math.log(2))
    assert evaluation.bits_per_character == pytest.approx(3 * evaluation.bits_per_byte, rel=0.01)


DAMAGE = {
    "config.json": (lambda data: data.replace(b'"hidden_size": 16', b'"hidden_size": 17'), r"config\.json: altered"),
    "tokenizer.json": (lambda data: data.replace(b"the", b"teh") or data, r"tokenizer\.json"),
    "model.safetensors": (lambda data: data[:-1], r"model\.safetensors: truncated or altered"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_altered_files_are_refused(text, tmp_path, name):
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1}))
    path = tmp_path / "run" / name
    spoil, message = DAMAGE[name]
    data = path.read_bytes()
    spoilt = spoil(data)
    if spoilt == data:
        tokenizer = json.loads(data)
        tokenizer["characters"] = tokenizer["characters"][::-1]
        spoilt = json.dumps(tokenizer, ensure_ascii=False).encode()
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match=message):
        open_run(tmp_path / "run").load_model()


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(InputError, match="no such run"):
        open_run(tmp_path / "none")
    with pytest.raises(InputError, match=r"not a run, it has no config\.json"):
        open_run(tmp_path)
    for trial in ("trial-0001", "trial-0000"):
        (tmp_path / trial).mkdir()
        (tmp_path / trial / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"such as .*/trial-0000$"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a run's configuration"):
        open_run(tmp_path)


def test_a_corpus_stays_in_its_file(text, tmp_path):
    train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1}))
    corpus = open_run(tmp_path / "run").corpus()
    assert isinstance(corpus.train, StoredTokens)
    whole = np.fromfile(tmp_path / "run" / "data" / "tokens.bin", dtype=corpus.train.dtype)
    assert np.array_equal(np.concatenate([corpus.train, corpus.held_out]), whole)


def test_the_options_in_the_run_given_back_make_the_same_run(text, tmp_path):
    options = TrainingOptions(**SMALL, include='a"\\b*', dropout=0.3, lr=3e-3)
    first = train([text], tmp_path / "first", options)
    again = TrainingOptions.from_toml(tmp_path / "first" / "config.toml")
    assert again == options
    second = train([text], tmp_path / "second", again)
    weights = [open_run(summary.run).load_model().state_dict() for summary in (first, second)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    changed = TrainingOptions.from_toml(tmp_path / "first" / "config.toml", {"minutes": 1.0, "hidden": 5})
    assert (changed.steps, changed.minutes, changed.hidden, changed.lr) == (None, 1.0, 5, 3e-3)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read TensorBoard's event files: records of a length, its checksum, an event, its checksum."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            at += size + 16
    return found


def test_tensorboard_shows_what_metrics_hold(text, tmp_path):
    summary = train([text], tmp_path / "run", TrainingOptions(**SMALL, eval_every=2, tensorboard=True))
    shown = scalars(summary.run / "tensorboard")
    written = [entry.name for entry in (summary.run / "tensorboard").iterdir()]
    assert all(re.search(r"\.[0-9a-f]{16}$", name) for name in written)  # nobody can have put another file's name there
    lines = open_run(summary.run).metrics()
    for line in lines:
        prefix = f"{line['event']}/" if "event" in line else "training/"
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                assert (line["step"], pytest.approx(float(value), rel=1e-6)) in shown[prefix + name]
    assert "training/loss" in shown
    assert "validation/loss" in shown
    assert not (train([text], tmp_path / "plain", TrainingOptions(**SMALL)).run / "tensorboard").exists()


def test_tensorboard_without_its_library_is_refused_at_once(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--tensorboard needs tensorboardX: pip install 'throughtime\[tensorboard\]'"):
        train([text], tmp_path / "run", TrainingOptions(**SMALL, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_what_a_probe_measures_is_in_the_metrics(text, tmp_path):
    options = TrainingOptions(steps=7, hidden=8, batch=4, bptt=16, gradients_every=3)
    with pytest.raises(InputError, match="expected a probe to measure with"):
        train([text], tmp_path / "none", options)
    run = train([text], tmp_path / "run", options, probe=lambda *window: {"horizon": 5.0, "decay": None}).run
    lines = {line["step"]: line for line in open_run(run).metrics()}
    assert {3, 6} <= set(lines)
    assert all(lines[step]["horizon"] == 5 and lines[step]["decay"] is None for step in (3, 6))
    assert "clip_share" in lines[3]
    assert "scalars" not in lines[3]
    assert "horizon" not in lines[1]


def test_an_mlp_has_no_gradients_to_follow():
    with pytest.raises(InputError, match="an mlp carries no state"):
        TrainingOptions(cell="mlp", gradients_every=3)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_regularised_training_is_resumed_to_the_bit(text, tmp_path, cell):
    options = {"layer_norm": True, "zoneout": 0.1, "recurrent_dropout": 0.2, "weight_drop": 0.1, "ar": 2.0, "tar": 1.0}
    options = TrainingOptions(**SMALL | {"steps": 12}, cell=cell, layers=2, dropout=0.1, **options)
    whole = train([text], tmp_path / "whole", options)

    def stop(report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    assert train([text], tmp_path / "cut", options, stop).interrupted
    assert resume(tmp_path / "cut").steps == 12
    wanted, _ = load(whole.run / "checkpoint" / "latest.safetensors")
    found, _ = load(tmp_path / "cut" / "checkpoint" / "latest.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


NOT_OF_ITS_TYPE = [
    *[{"steps": value} for value in (1.5, 2.0, "8", True, 10**400)],
    *[{"clip": value} for value in (True, "8", None)],
    *[
        {name: None}
        for name in ("lr", "seed", "split", "eval_every", "ema", "momentum", "weight_decay", "min_count", "final_lr")
    ],
    *[{name: 5} for name in ("level", "cell", "sequence", "mode", "init", "device", "tied", "locked", "freeze")],
    *[{"preset": ["awd-lstm"]}, {"include": ["*.txt"]}, {"include": "caf\udce9*"}, {"nonmonotone": []}],
    *[{"tensorboard": "no"}, {"split_punctuation": 1}, {"min_count": math.nan}, {"hidden": 2**70}],
]


@pytest.mark.parametrize("values", NOT_OF_ITS_TYPE, ids=str)
def test_an_option_is_of_its_type(values):
    """What is taken here is written to config.json, and has to be taken when that is read."""
    (name,) = values
    for make in (lambda: TrainingOptions(**values), lambda: TrainingOptions.from_values(values)):
        with pytest.raises(InputError, match=rf"^{name} = .*: expected "):
            make()


def test_numbers_of_numpy_are_numbers(text, tmp_path):
    values = {
        "batch": np.int64(4),
        "steps": np.int32(2),
        "dropout": np.float32(0.5),
        "tied": np.bool_(False),
        "seed": np.uint8(3),
    }
    options = TrainingOptions(**SMALL | values)
    assert {type(getattr(options, name)) for name in values} == {int, float, bool}
    assert open_run(train([text], tmp_path / "run", options).run).options["dropout"] == 0.5
    assert ModelConfig(np.int64(5), dropout=np.float32(0.5)).vocabulary_size == 5


BEYOND = [
    *[
        {"minutes": 1e308},
        {"epochs": 1e308},
        {"steps": 2**62},
        {"init_range": 1e39},
        {"clip_value": 1e39},
        {"clip": 1e308},
    ],
    *[{"init": name} for name in ("chrono:1e308", "forget:1e39", "forget:nan", "forget:", "orthogonal:1e39", "chrono")],
]


@pytest.mark.parametrize("values", BEYOND, ids=str)
def test_numbers_beyond_what_can_be_computed_are_refused(values):
    with pytest.raises(InputError, match="expected"):
        TrainingOptions(**values)


def test_a_time_without_end_is_refused_however_it_is_chosen_for():
    with pytest.raises(InputError, match="minutes = 1e\\+308: expected a number above 0, at most 1e12"):
        TrainingOptions.from_values(for_minutes({"minutes": 1e308}, 1000).options)


def test_nothing_is_trained_on_a_device_that_computes_nothing(text, tmp_path):
    with pytest.raises(InputError, match="--device meta: can't be used here"):
        train([text], tmp_path / "run", TrainingOptions(**SMALL | {"device": "meta"}))


def test_what_a_last_step_spoils_is_no_run(text, tmp_path):
    with pytest.raises(NonFiniteError, match="--lr, --clip"):
        train([text], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1, "lr": 1e38}))
    train([text], tmp_path / "good", TrainingOptions(**SMALL | {"steps": 3}))
    with pytest.raises(NonFiniteError):
        resume(tmp_path / "good", longer=Budget(steps=1), learning_rate=1e38)
    assert resume(tmp_path / "good", longer=Budget(steps=1), learning_rate=1e-3).steps == 4  # from where it was good
