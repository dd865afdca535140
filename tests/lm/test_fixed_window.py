"""The fixed-window model is Bengio's, sees its window and nothing else, and goes wherever a recurrent one goes."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from throughtime import InputError
from throughtime.lm import LanguageModel, ModelConfig, Sampling, TrainingOptions, evaluate, generate, open_run, train
from throughtime.lm.fixed_window import FixedWindow


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("width", [0, 5])
def test_it_is_the_equation(window, width):
    layer = FixedWindow(7, width or 7, 4, window=window)
    torch.nn.init.normal_(layer.bias)
    ids = torch.randint(0, 7, (6, 2))
    embedding = torch.randn(7, width) if width else None
    h, state = layer(ids, embedding=embedding)
    x = one_hot(ids, 7).float() if embedding is None else embedding[ids]
    for t in range(6):
        total = layer.bias + sum(x[t - k] @ layer.weight[k] for k in range(window) if t >= k)
        torch.testing.assert_close(h[t], torch.tanh(total))
    assert state.shape == (window - 1, 2)


@pytest.mark.parametrize("options", [{}, {"embedding_size": 5}, {"num_layers": 3}, {"embedding_size": 8, "tied": True}])
def test_it_sees_its_window_and_nothing_else(options):
    model = LanguageModel(ModelConfig(vocabulary_size=9, cell="mlp", hidden_size=8, window=3, **options)).eval()
    ids = torch.randint(0, 9, (10, 1))
    changed = ids.clone()
    changed[4] = (ids[4] + 1) % 9
    differs = (model(ids)[0] != model(changed)[0]).any(2).squeeze()
    assert differs.tolist() == [4 <= t < 7 for t in range(10)]


def test_gradients_reach_tokens_that_were_read_in_an_earlier_window():
    """The state holds tokens, not vectors, so cutting the text in windows cuts no gradient."""
    ids = torch.randint(0, 9, (12, 2))
    gradients = []
    for windows in ([ids], [ids[:5], ids[5:7], ids[7:]]):
        torch.manual_seed(1)
        model = LanguageModel(ModelConfig(vocabulary_size=9, cell="mlp", hidden_size=8, embedding_size=4, window=5))
        state, total = None, 0.0
        for part in windows:
            logits, state = model(part, state)
            total = total + logits.square().sum()
        total.backward()
        gradients.append(model.embedding.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", ["stream", "sentence"])
def test_it_trains_evaluates_and_writes(tmp_path, mode):
    path = tmp_path / "text.txt"
    path.write_text("abcd\n" * 400)
    options = TrainingOptions(cell="mlp", window=4, hidden=16, batch=4, bptt=8, steps=120, lr=0.03, mode=mode)
    summary = train([path], tmp_path / "run", options)
    assert summary.evaluation.perplexity < 1.2
    run = open_run(tmp_path / "run")
    assert "".join(generate(run.load_model(), run.tokenizer, "ab", 2, Sampling(greedy=True))) == "cd"


def test_a_long_text_is_evaluated_in_streams(tmp_path, monkeypatch):
    import importlib

    module = importlib.import_module("throughtime.lm.evaluation")
    tokens = np.random.default_rng(0).integers(0, 9, 900)
    model = LanguageModel(ModelConfig(vocabulary_size=9, cell="mlp", hidden_size=8, window=4))
    whole = evaluate(model, tokens).nats_per_token
    monkeypatch.setattr(module, "_EXACT", 400)
    assert evaluate(model, tokens).nats_per_token == pytest.approx(whole, rel=1e-6)


def test_a_window_beyond_reason_is_refused():
    with pytest.raises(InputError, match="window = 0: expected a whole number, at least 1"):
        ModelConfig(vocabulary_size=5, cell="mlp", window=0)
