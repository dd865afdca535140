"""Every token is scored once, with the state that it should have."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from throughtime import InputError
from throughtime.lm import LanguageModel, ModelConfig, evaluate, loss_by_position

# the package exports the function under the same name
evaluate_module = importlib.import_module("throughtime.lm.evaluation")


@pytest.fixture
def model() -> LanguageModel:
    model = LanguageModel(ModelConfig(vocabulary_size=7, hidden_size=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 7, 1000).astype(np.uint8)


@torch.no_grad()
def nats_at_once(model: LanguageModel, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits, _ = model.eval()(ids[:-1, None])
    return cross_entropy(logits[:, 0], ids[1:], reduction="none")


@pytest.mark.parametrize("window", [1, 7, 512, 5000])
def test_windows_carry_the_state(model, tokens, window):
    expected = nats_at_once(model, tokens).mean().item()
    result = evaluate(model, tokens, window=window)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 999
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_units(model, tokens):
    result = evaluate(model, tokens, characters=500, bytes=2000)
    bits = result.nats_per_token / math.log(2)
    assert result.bits_per_character == pytest.approx(2 * bits)
    assert result.bits_per_byte == pytest.approx(bits / 2)
    assert evaluate(model, tokens).bits_per_character == pytest.approx(bits)
    assert evaluate(model, tokens, unknown_id=3).unknown == int((tokens[1:] == 3).sum())


@pytest.mark.parametrize("count", [1000, 999, 997])
@pytest.mark.parametrize("window", [50, 64])
def test_parallel_streams_score_each_token_once_after_a_warm_up(model, tokens, monkeypatch, count, window):
    """Streams of a long text: the first equals a run from the start; the others have their warm-up as context."""
    monkeypatch.setattr(evaluate_module, "_EXACT", 400)
    monkeypatch.setattr(evaluate_module, "_WARM_UP", 60)
    tokens = tokens[:count]
    targets = count - 1
    streams = -(-targets // 100)
    stride = -(-targets // streams)
    expected = 0.0
    for stream in range(streams):
        begin, end = stream * stride, min((stream + 1) * stride, targets)
        warm = max(begin - 60, 0)
        expected += nats_at_once(model, tokens[warm : end + 1])[begin - warm :].sum().item()
    assert evaluate(model, tokens, window=window).nats_per_token == pytest.approx(expected / targets, rel=1e-5)


def test_training_mode_is_put_back(model, tokens):
    model.train()
    evaluate(model, tokens)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_too_little_text(model):
    with pytest.raises(InputError, match="1 tokens to evaluate on; at least 2 are needed"):
        evaluate(model, np.array([3]))


@pytest.mark.parametrize("cold", [1, 64, 999, 5000])
def test_cold_windows_start_from_a_fresh_state(model, tokens, cold):
    windows = [nats_at_once(model, tokens[begin : begin + cold + 1]) for begin in range(0, 999, cold)]
    result = evaluate(model, tokens, cold=cold)
    assert result.nats_per_token == pytest.approx(torch.cat(windows).mean().item(), rel=1e-5)
    assert result.tokens == 999
    assert result.method == f"cold windows of {cold:,} tokens"
    by_position = loss_by_position(model, tokens, cold=cold)
    for place in {0, 1, 7, cold - 1} & set(range(min(cold, 999))):
        lost = [nats[place].item() for nats in windows if len(nats) > place]
        assert by_position.tokens[place] == len(lost)
        assert by_position.nats[place] == pytest.approx(np.mean(lost), rel=1e-5)
    assert int(by_position.tokens.sum()) == 999


def test_sequences_by_position(model, tokens):
    tokens[-1] = 2
    ends = np.flatnonzero(tokens == 2) + 1
    sequences = [tokens[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    lost = [nats_at_once(model, np.concatenate([[2], sequence])).tolist() for sequence in sequences]
    found = loss_by_position(model, tokens, eos_id=2)
    assert len(found.nats) == max(map(len, lost))
    for place in range(len(found.nats)):
        there = [nats[place] for nats in lost if len(nats) > place]
        assert found.tokens[place] == len(there)
        assert found.nats[place] == pytest.approx(np.mean(there), rel=1e-5)
    assert evaluate(model, tokens, eos_id=2).method == "each sequence from a fresh state"


def test_what_cold_windows_and_positions_need(model, tokens):
    with pytest.raises(InputError, match="--cold 0: expected a number of tokens, at least 1"):
        evaluate(model, tokens, cold=0)
    with pytest.raises(InputError, match="a run of sequences reads each one from a fresh state anyway"):
        evaluate(model, tokens, cold=5, eos_id=2)
    with pytest.raises(InputError, match="--by-position counts from a fresh state; add --cold W"):
        loss_by_position(model, tokens)
