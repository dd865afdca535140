"""Sampling chooses from where it should, reproducibly."""

import pytest
import torch

from throughtime import InputError
from throughtime.lm import ByteTokenizer, CharTokenizer, LanguageModel, ModelConfig, Sampling, generate

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(sampling: Sampling, count: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.tensor([sampling.choose(LOGITS.clone(), generator) for _ in range(count)]).bincount(minlength=4) / count
    )


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(greedy=True), [1, 0, 0, 0]),
        (Sampling(top_k=1), [1, 0, 0, 0]),
        (Sampling(top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_p=0.4), [1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
        (Sampling(temperature=1e-4), [1, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_distributions(sampling, expected):
    assert draws(sampling).tolist() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "--temperature 0: expected a number above 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": 0}, "--top-k 0: expected at least 1"),
        ({"top_p": 0.0}, "--top-p 0.0: expected a probability"),
        ({"top_p": 1.5}, "--top-p 1.5"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer("abc\n")


@pytest.fixture
def model(tokenizer) -> LanguageModel:
    return LanguageModel(ModelConfig(vocabulary_size=tokenizer.vocabulary_size, cell="gru", hidden_size=8))


def test_a_seed_repeats_a_text_and_none_does_not(model, tokenizer):
    first, second = ("".join(generate(model, tokenizer, "ab", 40, seed=5)) for _ in range(2))
    assert first == second
    assert len(first) == 40
    assert len({"".join(generate(model, tokenizer, "ab", 40)) for _ in range(4)}) > 1


def test_the_unknown_token_is_read_but_never_written(model, tokenizer):
    with torch.no_grad():
        model.output.bias[0] = 50
    text = "".join(generate(model, tokenizer, "a한b", 60, seed=1))
    assert set(text) <= set("abc\n")


@pytest.mark.parametrize("characters", ["abc\n", "abc"])
def test_an_empty_prompt_starts_somewhere(characters):
    tokenizer = CharTokenizer(characters)
    model = LanguageModel(ModelConfig(vocabulary_size=tokenizer.vocabulary_size, hidden_size=8))
    assert len("".join(generate(model, tokenizer, length=10, seed=1))) == 10


def test_greedy_follows_the_model_step_by_step(model, tokenizer):
    text = "".join(generate(model, tokenizer, "abca", 12, Sampling(greedy=True)))
    ids = tokenizer.encode("abca" + text)
    with torch.no_grad():
        logits, _ = model.eval()(torch.from_numpy(ids)[:, None])
    logits[:, :, 0] = -torch.inf
    assert logits[3:-1, 0].argmax(1).tolist() == ids[4:].tolist()


def test_bytes_that_make_no_character_are_held_back(monkeypatch):
    model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=4))
    wanted = iter("가나".encode())
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(wanted))
    assert list(generate(model, ByteTokenizer(), "x", 6)) == ["가", "나"]


def test_length_is_checked_before_anything_runs(model, tokenizer):
    with pytest.raises(InputError, match="--length 0: expected at least 1"):
        generate(model, tokenizer, length=0)
