"""Sampling chooses from where it should, reproducibly."""

import itertools

import numpy as np
import pytest
import torch

from throughtime import InputError
from throughtime.lm import (
    ByteTokenizer,
    CharTokenizer,
    LanguageModel,
    ModelConfig,
    Sampling,
    Tokenization,
    WordTokenizer,
    beam_search,
    build_corpus,
    generate,
    generate_bytes,
    score_lines,
    train_bpe,
)
from throughtime.lm.generation import open_with, seed_of_sample

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(sampling: Sampling, count: int = 2000) -> torch.Tensor:
    generator = np.random.default_rng(1)
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
        (Sampling(min_p=0.4), [0.625, 0.375, 0, 0]),
        (Sampling(min_p=0.2), [0.526, 0.316, 0.158, 0]),
        (Sampling(typical_p=0.2), [0, 1, 0, 0]),  # −ln p is 0.69 1.20 1.90 3.00, its mean 1.14
        (Sampling(typical_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(top_k=3, min_p=0.5), [0.625, 0.375, 0, 0]),
        (Sampling(top_k=3, typical_p=1.0), [0.526, 0.316, 0.158, 0]),
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
        ({"min_p": 0.0}, "--min-p 0.0: expected a probability"),
        ({"typical_p": 2.0}, "--typical-p 2.0: expected a probability"),
        (
            {"repetition_penalty": 0.0},
            "--repetition-penalty 0.0: expected a number above 0, from 1e-6 to 1e6; 1 is off",
        ),
        ({"repetition_penalty": 1e-39}, "--repetition-penalty 1e-39"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty nan"),
        ({"no_repeat_ngram": -1}, "--no-repeat-ngram -1: expected"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def chosen(sampling: Sampling, logits: list[float], history: list[int]) -> int | None:
    return sampling.choose(torch.tensor(logits), np.random.default_rng(1), history)


def test_what_occurred_is_less_likely_under_a_penalty():
    assert chosen(Sampling(greedy=True), [2.0, 1.5, -1.0], [0]) == 0
    assert chosen(Sampling(greedy=True, repetition_penalty=1.5), [2.0, 1.5, -1.0], [0]) == 1
    assert chosen(Sampling(greedy=True, repetition_penalty=1.5), [2.0, 1.5, -1.0], [1, 2]) == 0
    assert chosen(Sampling(greedy=True, repetition_penalty=2.0), [-3.0, -2.0, -3.5], [1]) == 0  # −2 · 2 is the least


@pytest.mark.parametrize(
    ("n", "history", "expected"),
    [
        (1, [0], 1),
        (2, [0, 1], 0),
        (2, [1, 0, 2, 1], 1),
        (3, [0, 1, 0, 2, 0, 1], 1),
        (3, [2, 1, 0, 2, 0, 1], 0),
        (4, [0, 1], 0),
        (1, [0, 1, 2], None),
        (2, [0], 0),
    ],
)
def test_no_ngram_occurs_twice(n, history, expected):
    assert chosen(Sampling(greedy=True, no_repeat_ngram=n), [3.0, 2.0, 1.0], history) == expected


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
    model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=4)).double()  # which no stream reads
    wanted = iter("가나".encode())
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(wanted))
    assert list(generate(model, ByteTokenizer(), "x", 6)) == ["가", "나"]


def test_generated_text_repeats_no_ngram(model, tokenizer):
    text = "".join(generate(model, tokenizer, "ab", 200, Sampling(no_repeat_ngram=3), seed=1))
    text = "ab" + text
    trigrams = [text[i : i + 3] for i in range(len(text) - 2)]
    assert len(trigrams) == len(set(trigrams)) > 20  # it ends where no other trigram is left


@pytest.mark.parametrize("stop", ["ca", "b", "aa", "abcab", "nothing"])
def test_stop_texts_end_a_text_and_are_not_part_of_it(model, tokenizer, stop):
    for seed in range(5):
        whole = "".join(generate(model, tokenizer, "ab", 60, seed=seed))
        stopped = list(generate(model, tokenizer, "ab", 60, seed=seed, stop=[stop, "no such text"]))
        assert "".join(stopped) == whole.partition(stop)[0]
        assert all(stopped)


def test_a_stop_text_that_is_empty_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="--stop '': expected a text that isn't empty"):
        generate(model, tokenizer, "ab", 5, stop=[""])


def scored(model, tokenizer, prompt: str, text: str) -> float:
    ids = tokenizer.encode(prompt + text)
    with torch.no_grad():
        logits, _ = model.eval()(torch.from_numpy(ids)[:, None])
    logits[..., 0] = -torch.inf
    p = logits[len(prompt) - 1 : -1, 0].log_softmax(1)
    return p.gather(1, torch.from_numpy(ids[len(prompt) :])[:, None]).sum().item()


def test_a_wide_beam_finds_the_likeliest_text(model, tokenizer):
    with torch.no_grad():
        model.output.weight.mul_(4)
    every = ["".join(letters) for letters in itertools.product("abc\n", repeat=4)]
    best = max(every, key=lambda text: scored(model, tokenizer, "ab", text))
    found = beam_search(model, tokenizer, "ab", 4, beams=64)
    assert found[0].text == best
    assert len({beam.text for beam in found}) == 64
    for beam in found[:5]:
        assert beam.log_probability == pytest.approx(scored(model, tokenizer, "ab", beam.text), rel=1e-4)
        assert beam.tokens == 4


def test_one_beam_is_greedy(model, tokenizer):
    found = beam_search(model, tokenizer, "abca", 12, beams=1)
    assert [beam.text for beam in found] == ["".join(generate(model, tokenizer, "abca", 12, Sampling(greedy=True)))]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, -0.5])
def test_sequences_that_end_compete_with_longer_ones(penalty):
    tokenizer = CharTokenizer("ab", "line")
    model = LanguageModel(ModelConfig(vocabulary_size=4, cell="gru", hidden_size=8))
    with torch.no_grad():
        model.output.weight.mul_(4)
        model.output.bias[0] = -1e4
    texts = ["".join(letters) for n in range(6) for letters in itertools.product("ab", repeat=n)]
    nats = score_lines(model.eval(), tokenizer, texts).nats
    totals = {text: -n / (len(text) + 1) ** penalty for text, n in zip(texts, nats, strict=True) if len(text) < 5}
    best = beam_search(model, tokenizer, "", 5, beams=100, length_penalty=penalty)
    ended = [beam for beam in best if beam.tokens == len(beam.text) + 1]
    assert ended[0].text == max(totals, key=totals.get)
    assert [b.log_probability / b.tokens**penalty for b in best] == sorted(
        (b.log_probability / b.tokens**penalty for b in best), reverse=True
    )


@pytest.mark.parametrize("temperature", [1e-320, 1e-39, 1e-9, 1e39, 1e308])
@pytest.mark.parametrize("penalty", [1e-6, 1, 1e6])
def test_extreme_temperatures_are_the_extremes(model, tokenizer, temperature, penalty):
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    text = "".join(generate(model, tokenizer, "ab", 60, sampling, seed=1))
    if temperature < 1:
        greedy = Sampling(greedy=True, repetition_penalty=penalty)
        assert text == "".join(generate(model, tokenizer, "ab", 60, greedy))
    elif penalty == 1:
        assert min(text.count(character) for character in "abc\n") >= 5  # all are as likely


def test_weights_that_are_no_numbers_are_refused(model, tokenizer):
    with torch.no_grad():
        model.output.bias[2] = torch.nan
    with pytest.raises(InputError, match="the model's output is no number"):
        list(generate(model, tokenizer, "ab", 5))


def test_samples_of_different_seeds_have_nothing_in_common(model, tokenizer):
    seeds = [1, 2, 3, 2**32 + 1, 2**63 - 1]
    drawn = {
        (seed, number): "".join(generate(model, tokenizer, "ab", 40, seed=seed_of_sample(seed, number)))
        for seed in seeds
        for number in range(4)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert drawn[1, 0] == "".join(generate(model, tokenizer, "ab", 40, seed=1))
    assert seed_of_sample(None, 3) is None


@pytest.mark.parametrize("penalty", [float("nan"), float("inf"), -float("inf"), 1e308, 11])
def test_a_length_penalty_out_of_range(model, tokenizer, penalty):
    with pytest.raises(
        InputError, match=f"--length-penalty {penalty}: expected a number from -10 to 10".replace("+", r"\+")
    ):
        beam_search(model, tokenizer, "ab", length_penalty=penalty)


def test_a_beam_needs_a_width(model, tokenizer):
    with pytest.raises(InputError, match="--beams 0: expected from 1 to 1,000"):
        beam_search(model, tokenizer, "ab", beams=0)


def test_a_word_comes_with_its_space():
    tokenizer = WordTokenizer(["0a", "1,", "0b"])
    model = LanguageModel(ModelConfig(vocabulary_size=4, hidden_size=4, embedding_size=4))
    for prompt in ("a", "a ", "a, "):
        text = prompt + "".join(generate(model, tokenizer, prompt, 30, seed=2))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "  " not in text


CODE = "def f(x):\n    if x:\n        return  x\n\n" * 30


@pytest.mark.parametrize("level", ["char", "byte", "word", "bpe"])
@pytest.mark.parametrize(
    "prompt",
    ["", "    ", " ", "def f(x):\n    ", "def f(x):\n        ", "def ", "def  ", "if x", "return (", "\n", "\n\n "],
)
def test_a_prompt_is_continued_as_it_is(tmp_path, level, prompt):
    """What is printed is what the model read and chose, and begins with the prompt to the letter."""
    (tmp_path / "code.py").write_text(CODE + "\n  \n\n    \n\n  x = f(x)  \nx\n x" * 3)
    how = Tokenization(level, vocabulary=300 if level == "bpe" else None, min_count=1)
    tokenizer = build_corpus([tmp_path / "code.py"], tmp_path / "data", how, split=0.99).tokenizer
    model = LanguageModel(ModelConfig(tokenizer.vocabulary_size, hidden_size=16))
    opening = open_with(tokenizer, prompt)
    if tokenizer.unknown_id not in opening.read:
        assert tokenizer.decode(opening.read) + opening.owed == prompt
    for beam in beam_search(model, tokenizer, prompt, 6, alphabet="abcdefghijklmnopqrstuvwxyz():\n "):
        if tokenizer.unknown_id not in opening.read:
            assert tokenizer.decode([*opening.read, *beam.ids]) == prompt + beam.text
        best = beam.text
    assert best


def test_indentation_is_read(tmp_path):
    """Two prompts that differ in their indentation alone aren't the same to a model of words or of bpe tokens."""
    (tmp_path / "code.py").write_text(CODE)
    for level in ("word", "bpe"):
        how = Tokenization(level, vocabulary=300 if level == "bpe" else None)
        tokenizer = build_corpus([tmp_path / "code.py"], tmp_path / level, how).tokenizer
        less, more = (open_with(tokenizer, "if x:\n" + " " * blanks).ids for blanks in (4, 8))
        assert less != more
        assert tokenizer.unknown_id not in (*less, *more)


def test_a_space_that_no_token_begins_with_is_read_as_it_is():
    tokenizer = train_bpe(["to be or not to be "] * 20, vocabulary_size=270)
    model = LanguageModel(ModelConfig(vocabulary_size=tokenizer.vocabulary_size, hidden_size=8))
    opening = open_with(tokenizer, "to ", "tobe")
    assert (tokenizer.decode(opening.ids), opening.owed) == ("to ", "")
    assert set("".join(generate(model, tokenizer, "to ", 30, seed=1, alphabet="tobe"))) <= set("tobe")


def test_blanks_that_a_line_begins_with_are_left_out_of_words_as_in_training():
    tokenizer = WordTokenizer(["0the", "0fox"], sequences="line")
    assert open_with(tokenizer, "  the ").ids == [1, 2]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer("line"), CharTokenizer("ab\n", "line")])
def test_a_prompt_of_two_lines_is_refused_where_a_line_is_a_sequence(tokenizer):
    with pytest.raises(InputError, match="the prompt goes beyond its line, and this run's sequences are lines"):
        generate(LanguageModel(ModelConfig(tokenizer.vocabulary_size, hidden_size=4)), tokenizer, "a\nb")


def test_bytes_come_out_as_they_are(monkeypatch):
    model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=4)).double()  # which no stream reads
    wanted = iter("caf\xe9, \xff\0".encode("latin-1"))
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(wanted))
    read = []
    monkeypatch.setattr(
        LanguageModel, "forward", lambda self, ids, state=None: read.append(ids) or (torch.zeros(1, 1, 256), state)
    )
    assert b"".join(generate_bytes(model, ByteTokenizer(), "d\xe9j\udce0", 8)) == b"caf\xe9, \xff\0"
    assert bytes(read[0].flatten().tolist()) == b"d\xc3\xa9j\xe0"
    wanted = iter(b"caf\xe9 end \xe9, no more")
    assert b"".join(generate_bytes(model, ByteTokenizer(), "", 30, stop=[" \udce9"])) == b"caf\xe9 end"


def test_length_is_checked_before_anything_runs(model, tokenizer):
    with pytest.raises(InputError, match="--length 0: expected a number of tokens from 1 to 1,000,000,000"):
        generate(model, tokenizer, length=0)


ALPHABETS = [
    (CharTokenizer("abc ", "line"), "ab", "ab"),
    (CharTokenizer("abc "), "c", "c"),
    (ByteTokenizer(), "xyz", "xyz"),
    (ByteTokenizer("line"), "0123456789", "0123456789"),
    (WordTokenizer(["0to", "0be", "0not", "1."], sequences="line"), "tobe", "tobe "),
]


@pytest.mark.parametrize(("tokenizer", "alphabet", "written"), ALPHABETS)
def test_an_alphabet_is_all_that_is_written(tokenizer, alphabet, written):
    model = LanguageModel(ModelConfig(vocabulary_size=tokenizer.vocabulary_size, hidden_size=8))
    text = "".join("".join(generate(model, tokenizer, length=60, seed=seed, alphabet=alphabet)) for seed in range(5))
    assert text
    assert set(text) <= set(written)
    found = beam_search(model, tokenizer, length=5, beams=3, alphabet=alphabet)
    assert all(set(beam.text) <= set(written) for beam in found)
    assert any(beam.text for beam in found)


def test_an_alphabet_of_everything_changes_nothing():
    tokenizer = CharTokenizer("abc")
    model = LanguageModel(ModelConfig(vocabulary_size=4, hidden_size=8))
    free = "".join(generate(model, tokenizer, "a", length=50, seed=1))
    assert "".join(generate(model, tokenizer, "a", length=50, seed=1, alphabet="abc")) == free
    assert beam_search(model, tokenizer, "a", 8, 3, alphabet="abc") == beam_search(model, tokenizer, "a", 8, 3)


def test_a_bpe_keeps_to_an_alphabet():
    tokenizer = train_bpe(["to be or not to be "] * 20, vocabulary_size=270)
    model = LanguageModel(ModelConfig(vocabulary_size=tokenizer.vocabulary_size, hidden_size=8))
    text = "".join(generate(model, tokenizer, length=80, seed=1, alphabet="tobe "))
    assert len(text) > 20
    assert set(text) <= set("tobe ")


def test_an_alphabet_that_allows_nothing():
    model = LanguageModel(ModelConfig(vocabulary_size=4, hidden_size=8))
    for alphabet in ("", "xyz"):
        with pytest.raises(InputError, match="no token of the run is written with these characters alone"):
            generate(model, CharTokenizer("abc"), alphabet=alphabet)
        with pytest.raises(InputError, match="no token of the run is written with these characters alone"):
            beam_search(model, CharTokenizer("abc"), alphabet=alphabet)
    with pytest.raises(InputError, match="at level byte a character beyond ASCII is several tokens"):
        generate(LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8)), ByteTokenizer(), alphabet="한")
