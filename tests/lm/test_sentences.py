"""Sequences: encoded with their ends, trained with lengths, scored one by one, generated up to their end."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import throughtime.lm.reading as reading
from throughtime import InputError
from throughtime.lm import (
    ByteTokenizer,
    CharTokenizer,
    Hypothesis,
    LanguageModel,
    ModelConfig,
    Sampling,
    Tokenization,
    TrainingOptions,
    beam_search,
    build_corpus,
    cell_names,
    evaluate,
    generate,
    open_run,
    rerank,
    score_lines,
    score_sequences,
    train,
)
from throughtime.lm.corpus import read_tokens
from throughtime.lm.encoding import is_held_out
from throughtime.lm.score import parse_hypotheses, read_lines

LINES = ["the fox", "a dog, a cat", "한글", "x", "to be or not to be", "no"]


def model_of(vocabulary_size: int, cell: str = "gru") -> LanguageModel:
    model = LanguageModel(ModelConfig(vocabulary_size, cell, hidden_size=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


@pytest.mark.parametrize("level", ["char", "byte", "word", "bpe"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_lines_are_sequences_and_empty_ones_are_left_out(tmp_path, monkeypatch, level, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes("\ufeffthe fox\r\n\n\r\na dog, a cat\n한글\nx\n".encode())
    (tmp_path / "b.txt").write_bytes(b"to be or not to be\nno")
    how = Tokenization(level, "line", min_count=1)
    corpus = build_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "data", how, split=0.7)
    tokens = np.concatenate([corpus.train, corpus.held_out])
    tokenizer = corpus.tokenizer
    assert np.count_nonzero(tokens == tokenizer.eos_id) == 6
    first = "\ufeffthe fox" if level == "byte" else "the fox"
    expected = [first, *LINES[1:]]
    held_out = [line for line, out in zip(expected, is_held_out(np.arange(6), 0.7), strict=True) if out]
    if level == "word":  # what stands in the held-out text only is unknown
        assert tokenizer.decode(corpus.held_out).count("\n") == len(held_out)
        held_out = None
    kept = [line for line in expected if held_out is None or line not in held_out]
    if held_out is None:
        kept = [line for line, out in zip(expected, is_held_out(np.arange(6), 0.7), strict=True) if not out]
    else:
        assert tokenizer.decode(corpus.held_out) == "".join(line + "\n" for line in held_out)
    assert tokenizer.decode(corpus.train) == "".join(line + "\n" for line in kept)
    assert read_tokens(tmp_path / "b.txt", tokenizer).tolist() == tokenizer.encode_lines(LINES[4:]).tolist()


@pytest.mark.parametrize("least", [0, 1 << 60])
def test_lines_of_blanks_are_no_sequences_of_words(tmp_path, monkeypatch, least):
    """Several processes and one leave out the same."""
    monkeypatch.setattr("throughtime.lm.encoding._WORTH_PROCESSES", least)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    path = tmp_path / "a.txt"
    path.write_text("the cat\n   \n\t \r\n \n  the  \n\na cat\n \t")
    corpus = build_corpus([path], tmp_path / "data", Tokenization("word", "line", min_count=1), split=0.5)
    tokens = np.concatenate([corpus.train, corpus.held_out])
    assert corpus.tokenizer.decode(tokens).count("\n") == 3
    read = read_tokens(path, corpus.tokenizer)
    assert np.count_nonzero(read == corpus.tokenizer.eos_id) == 3
    spaces = build_corpus([path], tmp_path / "chars", Tokenization("char", "line"))  # at other levels blanks are tokens
    assert np.count_nonzero(np.concatenate([spaces.train, spaces.held_out]) == 1) == 7


@pytest.mark.parametrize("level", ["char", "byte", "word", "bpe"])
def test_files_are_sequences(tmp_path, level):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("one line\nanother one\n")
    corpus = build_corpus([folder], tmp_path / "data", Tokenization(level, "file"), split=0.5)
    assert np.count_nonzero(corpus.train == corpus.tokenizer.eos_id) == 2
    assert corpus.tokenizer.decode(corpus.train) == "one line\nanother one\n\n" * 2
    assert (
        read_tokens(folder / "0.txt", corpus.tokenizer).tolist()
        == corpus.held_out[: len(corpus.held_out) // 2].tolist()
    )


def test_held_out_sequences_are_evenly_spread():
    assert np.flatnonzero(is_held_out(np.arange(30), 0.9)).tolist() == [9, 19, 29]
    assert is_held_out(np.arange(1000), 0.73).sum() == 270


def test_a_single_sequence_cant_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("one line only, and no other")
    with pytest.raises(InputError, match=r"a\.txt: 1 sequence in all; .*--mode stream"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("char", "line"))


def alone(model: LanguageModel, ids: list[int], end: int) -> tuple[float, float]:
    """The score of one sequence, by a plain call."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([end, *ids])[:, None])
    lost = cross_entropy(logits[:, 0], torch.tensor([*ids, end]), reduction="none")
    return lost.sum().item(), lost[-1].item()


@pytest.mark.parametrize("cell", cell_names())
@pytest.mark.parametrize("window", [1, 5, 512])
def test_each_sequence_scores_as_it_does_alone(cell, window):
    tokenizer = ByteTokenizer("line")
    model = model_of(257, cell)
    tokens = tokenizer.encode_lines(LINES)
    scores = score_sequences(model, tokens, 256, window)
    for place, line in enumerate(LINES):
        nats, eos_nats = alone(model, list(line.encode()), 256)
        assert scores.nats[place] == pytest.approx(nats, rel=1e-4)
        assert scores.eos_nats[place] == pytest.approx(eos_nats, rel=1e-4)
    result = evaluate(model, tokens, characters=40, eos_id=256, window=window)
    assert result.tokens == len(tokens)
    assert result.sequences == len(LINES)
    assert result.nats_per_token == pytest.approx(scores.nats.sum() / len(tokens))
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    without = (scores.nats - scores.eos_nats).sum() / (len(tokens) - len(LINES))
    assert result.perplexity_without_eos == pytest.approx(math.exp(without))
    assert result.bits_per_character == pytest.approx(scores.nats.sum() / math.log(2) / 40)


def test_a_run_of_a_stream_scores_lines_between_line_ends():
    tokenizer = CharTokenizer("\nabc")
    model = model_of(5)
    scores = score_lines(model, tokenizer, ["ab", "", "c"])
    for place, ids in enumerate([[2, 3], [], [4]]):
        assert scores.nats[place] == pytest.approx(alone(model, ids, 1)[0], rel=1e-4)
    with pytest.raises(InputError, match="knows no line end, so it can't score lines; train one with --mode sentence"):
        score_lines(model_of(4), CharTokenizer("abc"), ["ab"])


def test_probabilities_of_all_sequences_sum_to_one():
    """Every string over two letters, up to a length: what is missing is the probability of the longer ones."""
    tokenizer = CharTokenizer("ab", "line")
    model = model_of(4)
    with torch.no_grad():
        model.output.bias[0] = -1e4  # the unknown character
        model.output.bias[1] += 2
    lines = ["".join(letters) for n in range(10) for letters in itertools.product("ab", repeat=n)]
    total = np.exp(-score_lines(model, tokenizer, lines).nats).sum()
    assert 0.97 < total < 1


def test_n_best_lists():
    lines = ["k1\t-2\tthe fox", "k2\tno", "k1\t-1\tx", "k2\ta dog, a cat"]
    hypotheses = parse_hypotheses(lines, "list.txt")
    assert hypotheses[0] == Hypothesis("k1", -2.0, "the fox")
    assert hypotheses[1] == Hypothesis("k2", 0.0, "no")
    ranked = rerank(hypotheses, np.array([1.0, 5.0, 4.0, 2.0]), weight=0.5)
    assert [(h.text, h.score) for h in ranked["k1"]] == [("the fox", -2.5), ("x", -3.0)]
    assert [h.text for h in ranked["k2"]] == ["a dog, a cat", "no"]
    with pytest.raises(InputError, match=r"list\.txt, line 1: no tab; expected KEY<tab>TEXT"):
        parse_hypotheses(["alone"], "list.txt")
    with pytest.raises(InputError, match=r"list\.txt, line 2: score 'x'; expected a number"):
        parse_hypotheses(["k\ta", "k\tx\ta"], "list.txt")


def test_lines_are_read_one_by_one_with_the_empty_ones(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo\n")
    assert read_lines(tmp_path / "a.txt", CharTokenizer("abc")) == ["one", "", "two"]


def test_generation_stops_at_the_end():
    tokenizer = CharTokenizer("ab", "line")
    model = model_of(4)
    with torch.no_grad():
        model.output.bias[1] = 50
    assert "".join(generate(model, tokenizer, "a", 30, seed=1)) == ""
    best = beam_search(model, tokenizer, "a", 30)[0]
    assert (best.text, best.tokens) == ("", 1)
    with torch.no_grad():
        model.output.bias[1] = -50
    assert len("".join(generate(model, tokenizer, "a", 30, seed=1))) == 30


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_names_are_learned_with_their_ends(tmp_path, cell):
    (tmp_path / "names.txt").write_text("\n".join(["anna", "bob", "carlotta", "dan"] * 30))
    options = TrainingOptions(mode="sentence", cell=cell, hidden=32, batch=8, bptt=6, steps=150, lr=0.02, seed=2)
    summary = train([tmp_path / "names.txt"], tmp_path / "run", options)
    assert summary.evaluation.sequences == 12
    assert summary.evaluation.perplexity < 1.6  # four names, from their first letter on certain: the mean is about 1.3
    run = open_run(tmp_path / "run")
    written = {
        "".join(generate(run.load_model(), run.tokenizer, seed=seed, sampling=Sampling(top_p=0.9)))
        for seed in range(12)
    }
    assert written <= {"anna", "bob", "carlotta", "dan"}
    assert len(written) > 1
    assert evaluate(run.load_model(), run.corpus().held_out, eos_id=run.tokenizer.eos_id).perplexity == pytest.approx(
        summary.evaluation.perplexity
    )
