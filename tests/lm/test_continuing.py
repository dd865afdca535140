"""Going on from trained weights with another text: what is taken over, what is new, what holds still, what can't be."""

import os
import signal

import numpy as np
import pytest
import torch

from throughtime import InputError
from throughtime.lm import (
    LanguageModel,
    ModelConfig,
    TrainingOptions,
    open_run,
    options_from,
    pack,
    resume,
    token_names,
    train,
)
from throughtime.lm.transfer import take_over
from throughtime.training.checkpoint import load

SMALL = {"hidden": 12, "batch": 3, "bptt": 12, "steps": 12}
KINDS = {
    "char": {},
    "sentence": {"mode": "sentence", "cell": "gru", "layers": 2, "dropout": 0.2, "locked": True},
    "byte": {"level": "byte", "cell": "rnn"},
    "word": {"level": "word", "tied": True, "embedding": 6, "layer_norm": True, "weight_drop": 0.1},
    "bpe": {"level": "bpe", "vocabulary": 270, "mode": "sentence"},
    "mlp": {"cell": "mlp", "window": 3, "layers": 2, "eval_every": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40)
    (folder / "b.txt").write_text("the lazy QUEEN jumps over a fox, 나무!\n" * 40)
    for name, options in KINDS.items():
        train([folder / "a.txt"], folder / name, TrainingOptions(**SMALL | options))
    return folder


def go_on(folder, kind, out, observer=None, **given):
    run = open_run(folder / kind)
    return train([folder / "b.txt"], out, options_from(run, {"steps": 6} | given), observer, source=run)


def weights(run, last=False):
    return load(run / ("checkpoint/latest.safetensors" if last else "model.safetensors"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_another_text_is_gone_on_with_from_where_the_weights_are(folder, kind, tmp_path):
    """The first step's loss on the text there was is that of the trained weights, not that of fresh ones."""
    first = []
    run = open_run(folder / kind)
    for options, source in ((options_from(run, {"steps": 1}), run), (TrainingOptions(**SMALL | KINDS[kind]), None)):
        reports = []
        train([folder / "a.txt"], tmp_path / f"a{len(first)}", options, reports.append, source=source)
        first.append(reports[0].raw_loss)
    assert first[0] < first[1]
    go_on(folder, kind, tmp_path / "b")
    old, new = open_run(folder / kind), open_run(tmp_path / "b")
    known = old.model_config.vocabulary_size
    assert token_names(new.tokenizer)[:known] == token_names(old.tokenizer)
    more = new.model_config.vocabulary_size - known
    assert new.config.origin == {"run": kind, "new_tokens": more}
    assert (more > 0) == (kind not in ("byte", "bpe"))
    assert new.options["from_weights"] == old.weights_digest
    assert new.results is not None
    if more:
        assert not np.any(new.corpus().train == new.tokenizer.unknown_id)


@pytest.mark.parametrize("kind", ["char", "word", "sentence", "mlp"])
def test_a_vocabulary_may_stay_as_it_is(folder, kind, tmp_path):
    go_on(folder, kind, tmp_path / "b", grow_vocabulary=False)
    old, new = open_run(folder / kind), open_run(tmp_path / "b")
    assert new.tokenizer.to_json() == old.tokenizer.to_json()
    assert np.any(new.corpus().train == new.tokenizer.unknown_id)
    assert new.config.origin["new_tokens"] == 0


def test_new_words_come_after_those_there_are_the_most_frequent_first_and_no_more_than_wanted(folder, tmp_path):
    known = open_run(folder / "word").model_config.vocabulary_size
    go_on(folder, "word", tmp_path / "b", vocabulary=known + 2)
    assert open_run(tmp_path / "b").model_config.vocabulary_size == known + 2
    go_on(folder, "word", tmp_path / "c", vocabulary=3)
    assert open_run(tmp_path / "c").model_config.vocabulary_size == known


SHAPES = [
    {},
    {"cell": "gru", "num_layers": 2, "embedding_size": 4},
    {"cell": "rnn", "num_layers": 2, "embedding_size": 4, "tied": True, "layer_norm": True},
    {"cell": "mlp", "num_layers": 3, "window": 4},
    {"cell": "mlp", "embedding_size": 4},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_known_tokens_are_predicted_as_before_and_new_ones_as_the_mean(shape):
    torch.manual_seed(0)
    old = LanguageModel(ModelConfig(7, hidden_size=6, **shape)).eval()
    new = LanguageModel(ModelConfig(10, hidden_size=6, **shape)).eval()
    take_over(old, new, ordinary=2)
    ids = torch.randint(0, 7, (9, 3))
    with torch.no_grad():
        expected, _ = old(ids)
        found, _ = new(ids)
    assert torch.allclose(found[..., :7], expected, atol=1e-6)
    assert torch.allclose(found[..., 7:], expected[..., 2:].mean(-1, keepdim=True).expand(-1, -1, 3), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_are_found_where_locked_dropout_sets_them_apart(dropout):
    shape = {"vocabulary_size": 5, "hidden_size": 6, "num_layers": 3}
    old = LanguageModel(ModelConfig(**shape, dropout=0.3, locked=True)).eval()
    new = LanguageModel(ModelConfig(**shape, dropout=dropout)).eval()
    for source, target in ((old, new), (new, old)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        take_over(source, target, ordinary=1)
        ids = torch.randint(0, 5, (9, 3))
        assert torch.allclose(source(ids)[0], target(ids)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "parts", "held", "learned"),
    [
        ("sentence", "1", "recurrent.layers.0.", "recurrent.layers.1."),
        ("sentence", "2,output", "recurrent.layers.1.", "recurrent.layers.0."),
        ("mlp", "2", "recurrent.above.0.", "output."),
        ("char", "1", "recurrent.", "output."),
        ("word", "embedding", "embedding.", "recurrent."),
    ],
)
def test_frozen_parts_hold_still_and_the_others_learn(folder, kind, parts, held, learned, tmp_path):
    go_on(folder, kind, tmp_path / "b", freeze=parts, grow_vocabulary=False, locked=True, eval_every=0)
    old, new = weights(folder / kind), weights(tmp_path / "b")
    assert any(name.startswith(held) for name in old)
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith(held))
    assert not any(torch.equal(old[name], new[name]) for name in old if name.startswith(learned) and "bias" not in name)


@pytest.mark.parametrize("kind", ["sentence", "mlp"])
def test_what_is_stopped_goes_on_to_the_bit(folder, kind, tmp_path):
    def interrupt(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    given = {"freeze": "2"}
    whole = go_on(folder, kind, tmp_path / "whole", **given)
    assert go_on(folder, kind, tmp_path / "cut", interrupt, **given).interrupted
    assert resume(tmp_path / "cut").evaluation == whole.evaluation
    for last in (False, True):
        expected, actual = weights(tmp_path / "whole", last), weights(tmp_path / "cut", last)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_options_given_back_make_the_same_run(folder, tmp_path):
    run = open_run(folder / "char")
    go_on(folder, "char", tmp_path / "b", lr=0.003)
    options = TrainingOptions.from_toml(tmp_path / "b" / "config.toml")
    train([folder / "b.txt"], tmp_path / "again", options, source=run)
    first, again = weights(tmp_path / "b"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(InputError, match="expected --from RUN"):
        train([folder / "b.txt"], tmp_path / "c", options)
    with pytest.raises(InputError, match="its weights are"):
        train([folder / "b.txt"], tmp_path / "c", options, source=open_run(folder / "mlp"))
    assert not (tmp_path / "c").exists()


def test_a_pack_can_be_gone_on_from_and_tells_no_name(folder, tmp_path):
    pack(open_run(folder / "char"), tmp_path / "packed")
    run = open_run(tmp_path / "packed")
    train([folder / "b.txt"], tmp_path / "b", options_from(run, {"steps": 2}), source=run)
    pack(open_run(tmp_path / "b"), tmp_path / "again")
    assert open_run(tmp_path / "again").config.origin.keys() == {"new_tokens"}


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("char", {"hidden": 13}, "--hidden 13: the weights of .* are of --hidden 12"),
        ("char", {"cell": "gru"}, "--cell gru"),
        ("char", {"layers": 2}, "--layers 2"),
        ("char", {"level": "byte"}, "--level byte"),
        ("char", {"mode": "sentence"}, "--mode sentence"),
        ("char", {"embedding": 5}, "--embedding 5"),
        ("word", {"tied": False}, "--tied False"),
        ("char", {"preset": "zaremba-small"}, "the weights of"),
        ("char", {"init_range": 0.1}, "--init-range"),
        ("char", {"init": "forget:3"}, "--init draws"),
        ("char", {"freeze": "3"}, "part to --freeze '3'"),
        ("char", {"freeze": "embedding", "grow_vocabulary": False}, "one-hot"),
        ("char", {"freeze": "1,output", "grow_vocabulary": False}, "nothing is left"),
        ("char", {"freeze": "1"}, "tokens of this text are new"),
        ("word", {"freeze": "embedding"}, "tokens of this text are new"),
        ("char", {"from_weights": "abc"}, "SHA-256"),
    ],
)
def test_what_the_weights_cannot_be_is_refused_in_a_line(folder, kind, given, message, tmp_path):
    with pytest.raises(InputError, match=message) as refused:
        go_on(folder, kind, tmp_path / "b", **given)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", [{"freeze": "1"}, {"grow_vocabulary": False}])
def test_what_is_for_trained_weights_needs_some(options):
    with pytest.raises(InputError, match="expected --from RUN"):
        TrainingOptions(**options)


def test_what_was_not_said_is_as_the_run_was_trained(folder):
    options = options_from(open_run(folder / "sentence"), {"dropout": 0.4})
    assert (options.batch, options.bptt, options.dropout, options.locked, options.cell) == (3, 12, 0.4, True, "gru")
    assert (options.steps, options.minutes, options.budget.minutes) == (None, None, 3.0)
