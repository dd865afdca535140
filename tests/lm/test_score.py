"""Lines are scored with the line end that the run's text has, and what is unknown in them is told apart."""

import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from throughtime import InputError
from throughtime.lm import (
    CharTokenizer,
    LanguageModel,
    ModelConfig,
    Tokenization,
    TrainingOptions,
    build_corpus,
    evaluate,
    evaluate_adaptively,
    open_run,
    score_lines,
    tokenizer_from_json,
    train,
)
from throughtime.lm.evaluation import score_sequences
from throughtime.lm.reading import LineEnds
from throughtime.lm.score import check_weight, parse_hypotheses, read_lines
from throughtime.lm.tokenizer import line_end_ids

LINES = ["the cat sees", "a red ball.", "no", "the dog, the cat"] * 40


@pytest.mark.parametrize("level", ["char", "byte", "word", "bpe"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_streams_lines_are_scored_with_the_line_end_of_its_text(tmp_path, level, end):
    """Whatever ends the lines of the file: what a run has learned is what it is asked for."""
    path = tmp_path / "text.txt"
    path.write_bytes((end.join(LINES) + end).encode())
    options = TrainingOptions(
        level=level, vocabulary=280 if level == "bpe" else None, hidden=32, batch=4, bptt=16, steps=120, lr=0.02
    )
    train([path], tmp_path / "run", options)
    run = open_run(tmp_path / "run")
    assert run.tokenizer.line_end == end
    assert run.tokenizer.decode(line_end_ids(run.tokenizer)) == end
    model, scored = run.load_model(), []
    for other in ("\n", "\r\n", "\r"):
        (tmp_path / "lines.txt").write_bytes(other.join(LINES[:4]).encode())
        lines = read_lines(tmp_path / "lines.txt", run.tokenizer)
        assert lines == LINES[:4]
        scored.append(score_lines(model, run.tokenizer, lines))
    assert scored[0].nats.tolist() == scored[1].nats.tolist() == scored[2].nats.tolist()
    assert scored[0].eos_nats.mean() < 2.5  # such an end is expected; one without its \r came to 10 and more
    if level == "char" and end == "\r":
        with pytest.raises(InputError, match=r"line 2 holds a '\\r', which ends a line of this run's text"):
            score_lines(model, run.tokenizer, ["a", "b\rc"])


def test_line_ends_are_counted_however_the_bytes_come():
    data = b"a\r\nb\rc\n\nd\r\r\n" * 7 + b"\n" * 9 + b"\r"
    for size in (1, 2, 3, 1000):
        ends = LineEnds()
        for begin in range(0, len(data), size):
            ends.count(data[begin : begin + size])
        assert ends._counts == {"\n": 23, "\r\n": 14, "\r": 14}
        assert ends.usual == "\n"
    assert LineEnds().usual == "\n"


def test_line_ends_are_those_of_what_is_read(tmp_path):
    """A file that is left out doesn't count."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"one\r\ntwo\r\n" * 9)
    (tmp_path / "text" / "b.txt").write_bytes(b"one\ntwo\n" * 99 + b"\xff ")
    tokenizer = build_corpus([tmp_path / "text"], tmp_path / "data").tokenizer
    assert tokenizer.line_end == "\r\n"
    assert tokenizer_from_json(tokenizer.to_json()).line_end == "\r\n"
    with pytest.raises(InputError, match=r"line ends 'x'; the run's tokenizer.json is damaged"):
        tokenizer_from_json(tokenizer.to_json() | {"line_end": "x"})


def test_carriage_returns_alone_are_no_lines_to_train_on_and_the_message_says_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r" * 9)
    with pytest.raises(InputError, match=r"its lines end with a carriage return alone: convert it with tr '\\r' '\\n'"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("char", "line"))


def knowing() -> tuple[LanguageModel, np.ndarray]:
    model = LanguageModel(ModelConfig(vocabulary_size=6, hidden_size=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, np.random.default_rng(0).integers(0, 6, 3000)


def lost_at_each(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(tokens[:-1])[:, None])
    return cross_entropy(logits[:, 0], torch.from_numpy(tokens[1:]), reduction="none").double().numpy()


@pytest.mark.parametrize("how", ["carried", "adaptive", "streams", "cold"])
def test_a_text_is_measured_with_and_without_what_is_unknown(monkeypatch, how):
    model, tokens = knowing()
    lost, known = lost_at_each(model, tokens), tokens[1:] != 0
    if how == "streams":
        monkeypatch.setattr(sys.modules["throughtime.lm.evaluation"], "_EXACT", 1000)
    if how == "adaptive":
        result = evaluate_adaptively(model, tokens, unknown_id=0)
    else:
        result = evaluate(model, tokens, unknown_id=0, cold=3000 if how == "cold" else None)
    assert result.unknown == np.count_nonzero(~known)
    assert result.nats_per_token == pytest.approx(lost.mean(), rel=1e-3)
    assert result.nats_per_token_without_unknown == pytest.approx(lost[known].mean(), rel=1e-3)
    assert result.perplexity_without_unknown == pytest.approx(np.exp(lost[known].mean()), rel=1e-2)
    plain = evaluate(model, tokens)
    assert (plain.unknown, plain.nats_per_token_without_unknown, plain.perplexity_without_unknown) == (0, None, None)


def test_a_text_of_which_nothing_is_known():
    model, tokens = knowing()
    result = evaluate(model, np.zeros(9, dtype=np.int64), unknown_id=0)
    assert (result.unknown, result.nats_per_token_without_unknown) == (8, None)
    assert evaluate(model, np.maximum(tokens, 1), unknown_id=0).nats_per_token_without_unknown == pytest.approx(
        evaluate(model, np.maximum(tokens, 1)).nats_per_token
    )


@pytest.mark.parametrize("window", [1, 3, 512])
def test_each_line_tells_its_unknown_tokens(window):
    model, _ = knowing()
    tokenizer = CharTokenizer("abcd", "line")
    lines = ["abc", "aXbX", "", "XXXXXXX"]
    ids = tokenizer.encode_lines(lines)
    scores = score_sequences(model, ids, 1, window, unknown_id=0)
    assert scores.unknown.tolist() == [0, 2, 0, 7]
    assert scores.tokens.tolist() == [4, 5, 1, 8]
    for place, line in enumerate(lines):
        own = tokenizer.encode_lines([line])
        lost = lost_at_each(model, np.append(1, own))
        assert scores.nats[place] == pytest.approx(lost.sum(), rel=1e-4)
        assert scores.unknown_nats[place] == pytest.approx(lost[own == 0].sum(), rel=1e-4)
        assert scores.eos_nats[place] == pytest.approx(lost[-1], rel=1e-4)
    assert evaluate(model, ids, eos_id=1, unknown_id=0, window=window).unknown == 9
    of_lines = score_lines(model, tokenizer, lines)
    assert of_lines.unknown.tolist() == [0, 2, 0, 7]


def test_an_end_of_two_tokens_is_an_end():
    model, _ = knowing()
    tokenizer = CharTokenizer("ab\r\nc", line_end="\r\n")
    scores = score_lines(model, tokenizer, ["ab", ""])
    lost = lost_at_each(model, np.array([4, 1, 2, 3, 4]))
    assert scores.nats[0] == pytest.approx(lost.sum(), rel=1e-4)
    assert scores.eos_nats[0] == pytest.approx(lost[-2:].sum(), rel=1e-4)
    assert scores.nats[1] == pytest.approx(scores.eos_nats[1])


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "1e999"])
def test_a_score_of_a_list_has_to_be_finite(score):
    with pytest.raises(InputError, match=rf"list\.txt, line 2: score '{score}'; expected a finite number"):
        parse_hypotheses(["k\t1\ta", f"k\t{score}\ta"], "list.txt")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e300])
def test_a_weight_has_to_be_finite(weight):
    with pytest.raises(InputError, match=r"--weight .*: expected a finite number"):
        check_weight(weight)
