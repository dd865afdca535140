"""Every token is scored once, with the state that it should have."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from throughtime import InputError
from throughtime.lm import LanguageModel, ModelConfig, evaluate

# the package exports the function under the same name
evaluate_module = importlib.import_module("throughtime.lm.evaluate")


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
