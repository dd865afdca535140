"""Recipes hold options that exist and can be; a time chooses what nobody gave."""

from dataclasses import fields

import pytest
import torch

from throughtime import InputError
from throughtime.kernels import native
from throughtime.lm import TrainingOptions, open_run, train
from throughtime.lm.presets import PRESETS, SIZES, for_minutes, preset

NAMES = {field.name for field in fields(TrainingOptions)}
SHAKESPEARE = 1_115_394  # bytes


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_of_a_recipe_exists_and_can_be(name):
    assert PRESETS[name].keys() <= NAMES
    options = TrainingOptions.from_values({"preset": name})
    assert all(getattr(options, option) == value for option, value in PRESETS[name].items())
    assert TrainingOptions.from_values({**vars(options)}) == options  # as it is read back from a run


def test_what_is_given_beside_a_recipe_wins():
    options = TrainingOptions.from_values({"preset": "zaremba-small", "hidden": 7, "steps": 3})
    assert (options.hidden, options.embedding, options.steps, options.epochs) == (7, 200, 3, None)


def test_zaremba_small_is_the_published_one():
    """Of the loss summed over 20 steps, the rate is 1 and the norm at most 5; after 4 epochs the rate is halved in each."""
    options = TrainingOptions.from_values({"preset": "zaremba-small"})
    assert options.lr / options.bptt == 1
    assert options.clip * options.bptt == 5
    rates = [options.rates.factor(epoch / 13, epoch) for epoch in range(13)]
    assert rates == [1, 1, 1, 1, *(0.5**n for n in range(1, 10))]


def test_an_unknown_recipe_is_refused():
    for make in (
        preset,
        lambda name: TrainingOptions(preset=name),
        lambda name: TrainingOptions.from_values({"preset": name}),
    ):
        with pytest.raises(InputError, match="unknown preset 'zaremba'; did you mean 'zaremba-"):
            make("zaremba")


def test_a_recipe_trains_and_is_written_down(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog .\n" * 200)
    small = {"hidden": 6, "embedding": 5, "batch": 4, "bptt": 8, "steps": 12, "eval_every": 4}
    for name in ("awd-lstm", "zaremba-medium", "char-rnn"):
        embedding = {"embedding": 0} if name == "char-rnn" else {}
        train([text], tmp_path / name, TrainingOptions.from_values({"preset": name, **small, **embedding}))
        assert open_run(tmp_path / name).options["preset"] == name


@pytest.mark.parametrize("minutes", [0.01, 0.5, 1.0, 3.0, 10.0, 1e5])
@pytest.mark.parametrize("size", [0, 100, SHAKESPEARE, 10**12])
def test_every_time_and_size_has_options(minutes, size):
    options, reason = for_minutes({"minutes": minutes}, size)
    assert options.keys() <= NAMES
    assert TrainingOptions.from_values(options).minutes == minutes
    assert f"--hidden {options['hidden']}" in reason


def test_more_time_means_a_larger_model_and_more_passes_more_dropout():
    for dtype in ("bfloat16", "float32"):
        paces = [size.pace[dtype] for size in SIZES]
        assert paces == sorted(paces, reverse=True)
    assert for_minutes({"minutes": 10.0}, SHAKESPEARE).options["hidden"] == SIZES[-1].hidden
    assert for_minutes({"minutes": 0.5}, SHAKESPEARE).options["hidden"] == SIZES[0].hidden
    for size in SIZES[:-1]:  # the longest time of a row is its own
        options = for_minutes({"minutes": size.minutes}, SHAKESPEARE).options
        assert (options["layers"], options["hidden"]) == (size.layers, size.hidden)
    drops = [for_minutes({"minutes": 3.0}, size).options["dropout"] for size in (10**9, 3 * 10**6, 10**6, 10**5)]
    assert drops == sorted(drops)
    assert drops[0] == 0 < drops[-1]
    assert [size.minutes for size in SIZES] == sorted(size.minutes for size in SIZES)
    assert SIZES[-1].minutes == float("inf")


def test_what_is_given_is_not_chosen():
    given = {"minutes": 3.0, "hidden": 11, "dropout": 0.0, "dtype": "float32", "lr": None}
    options, reason = for_minutes(given, SHAKESPEARE)
    assert (options["hidden"], options["dropout"], options["dtype"]) == (11, 0.0, "float32")
    assert "--hidden" not in reason
    assert options["lr"] == for_minutes({}, SHAKESPEARE).options["lr"]
    assert for_minutes(options, SHAKESPEARE) == (options, None)  # as from a run's own file of options


def test_a_gpu_has_a_model_of_its_own(monkeypatch):
    options, reason = for_minutes({"minutes": 3.0, "device": "cuda"}, SHAKESPEARE)
    assert (options["layers"], options["hidden"], options["batch"], options["bptt"]) == (2, 512, 64, 128)
    assert (options["dtype"], options["dropout"], options["weight_drop"]) == ("bfloat16", 0.5, 0.3)
    assert TrainingOptions.from_values(options).weight_drop == 0.3
    assert "read about 99 times by a GPU: --layers 2  --hidden 512" in reason
    assert "--batch 64  --bptt 128" in reason
    short, _ = for_minutes({"device": "cuda"}, 10_000)
    assert not {"batch", "bptt"} & short.keys()  # what a short text has room for is found where it is read
    assert for_minutes({"minutes": 0.01, "device": "cuda"}, SHAKESPEARE).options.keys() & {"weight_drop"} == set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert for_minutes({}, SHAKESPEARE).options["hidden"] == 512
    assert for_minutes({"device": "cpu"}, SHAKESPEARE).options["hidden"] == 256


@pytest.mark.parametrize(
    "given",
    [{"steps": 3}, {"epochs": 1.0}, {"preset": "char-rnn"}, {"cell": "gru"}, {"level": "word"}, {"device": "mps"}],
)
def test_what_the_table_was_not_measured_for_is_left_alone(given):
    assert for_minutes(given, SHAKESPEARE) == (given, None)


@pytest.mark.parametrize(
    ("missing", "instruction_set", "dtype", "reason"),
    [
        (None, "avx512_bf16", "bfloat16", "bfloat16 since this CPU multiplies it twice as fast, with AVX512-BF16"),
        (None, "avx512", "float32", "float32 since with avx512 bfloat16 is no faster"),
        (None, "generic", "float32", "float32 since with generic bfloat16 is no faster"),
        ("gone", "", "float32", "float32 since the C++ kernels are missing"),
    ],
)
def test_the_dtype_is_what_this_machine_is_fastest_in(monkeypatch, missing, instruction_set, dtype, reason):
    monkeypatch.setattr(native, "missing", missing)
    monkeypatch.setattr(native, "instruction_set", lambda: instruction_set)
    options, said = for_minutes({}, SHAKESPEARE)
    assert options["dtype"] == dtype
    assert f"({reason})" in said
    given, said = for_minutes({"dtype": dtype}, SHAKESPEARE)
    assert given["dropout"] == options["dropout"]
    assert "since" not in said


def test_dropout_follows_from_the_pace_of_the_dtype():
    """In float32 a text is read less often in the same time, so the model overfits later."""
    given = {"minutes": 3.0}
    drops = {
        dtype: for_minutes(given | {"dtype": dtype}, 10**6).options["dropout"] for dtype in ("bfloat16", "float32")
    }
    assert drops == {"bfloat16": 0.4, "float32": 0.25}


def test_a_time_that_cant_be_is_refused():
    for minutes in (0, -1.0, float("nan"), float("inf"), "3"):
        with pytest.raises(InputError, match=r"--minutes .*: expected a number above 0"):
            for_minutes({"minutes": minutes}, SHAKESPEARE)
