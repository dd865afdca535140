"""Evaluation that learns as it reads: it predicts first, follows its formulas, and leaves the model alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from throughtime import InputError
from throughtime.lm import DynamicEvaluation, LanguageModel, ModelConfig, NeuralCache, evaluate, evaluate_adaptively
from throughtime.lm.adaptive import _mean_squares

SIZE = 7
EOS = 2


@pytest.fixture(params=["lstm", "gru", "rnn"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(ModelConfig(vocabulary_size=SIZE, cell=request.param, hidden_size=9, embedding_size=5))


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZE, 83).astype(np.uint8)


def by_hand(model: LanguageModel, tokens: np.ndarray, how: DynamicEvaluation, rms: list | None) -> float:
    """The formulas, written down once more."""
    model = copy.deepcopy(model).eval()
    weights = list(model.parameters())
    trained = [weight.detach().clone() for weight in weights]
    ids = torch.from_numpy(tokens.astype(np.int64))
    total, state = 0.0, None
    for begin in range(0, len(ids) - 1, how.segment):
        inputs, targets = ids[begin : begin + how.segment][: len(ids) - 1 - begin], ids[begin + 1 :][: how.segment]
        logits, state = model(inputs[:, None], state)
        state = tuple(part.detach() for part in state)
        loss = cross_entropy(logits[:, 0], targets)
        total += loss.item() * len(targets)
        gradients = torch.autograd.grad(loss, weights)
        mean = None if rms is None else float(torch.cat([r.flatten() for r in rms]).mean())
        with torch.no_grad():
            for k, (weight, g) in enumerate(zip(weights, gradients, strict=True)):
                if rms is None:
                    weight -= how.rate * g
                else:
                    pull = how.decay * torch.minimum(rms[k] / mean, torch.tensor(1 / how.decay))
                    weight += pull * (trained[k] - weight) - how.rate * g / (rms[k] + how.epsilon)
    return total / (len(ids) - 1)


@pytest.mark.parametrize("segment", [1, 5, 82, 500])
def test_sgd_is_its_formula(model, tokens, segment):
    how = DynamicEvaluation("sgd", learning_rate=0.5, segment=segment)
    found = evaluate_adaptively(model, tokens, dynamic=how)
    assert found.nats_per_token == pytest.approx(by_hand(model, tokens, how, None), rel=1e-5)
    assert found.tokens == 82


def test_rms_is_its_formula(model, tokens):
    how = DynamicEvaluation("rms", learning_rate=0.003, decay=0.1, segment=6)
    training = np.random.default_rng(1).integers(0, SIZE, 700)
    rms = [square.sqrt() for square in _mean_squares(model, training, how.segment)]
    found = evaluate_adaptively(model, tokens, dynamic=how, training=training)
    assert found.nats_per_token == pytest.approx(by_hand(model, tokens, how, rms), rel=1e-5)
    assert found.method == "carried state and dynamic evaluation (rms, rate 0.003, decay 0.1, segments of 6)"


def test_mean_squares_are_those_of_the_windows_gradients():
    model = LanguageModel(ModelConfig(vocabulary_size=SIZE, cell="gru", hidden_size=4)).eval()
    training = np.random.default_rng(1).integers(0, SIZE, 601)
    squares = _mean_squares(model, training, 2)  # a hundred streams of six tokens: three windows each
    ids = torch.from_numpy(training)[:600].view(100, 6).T
    after = torch.from_numpy(training)[1:].view(100, 6).T
    expected, state = [torch.zeros_like(s) for s in squares], None
    for begin in (0, 2, 4):
        logits, state = model(ids[begin : begin + 2], state)
        state = tuple(part.detach() for part in state)
        loss = cross_entropy(logits.flatten(0, 1), after[begin : begin + 2].flatten())
        for total, gradient in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += gradient**2 / 3
    for found, wanted in zip(squares, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_nothing_is_adapted_where_nothing_is_asked_for(model, tokens):
    plain = evaluate(model, tokens)
    found = evaluate_adaptively(model, tokens)
    assert found.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-6)
    assert found.method == plain.method == "carried state"


def test_the_model_stays_as_it_is(model, tokens):
    before = copy.deepcopy(model.state_dict())
    model.train()
    evaluate_adaptively(model, tokens, dynamic=DynamicEvaluation("sgd", 1.0), cache=NeuralCache(10))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_the_cache_is_its_formula(model, tokens, size, monkeypatch):
    monkeypatch.setattr("throughtime.lm.adaptive._SEGMENT", 16)  # so that what is remembered crosses segments
    how = NeuralCache(size, weight=0.4, sharpness=0.7)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        h, _ = model.eval().hidden(ids[:-1, None])
        p = model.readout(h)[:, 0].softmax(-1)
    total = 0.0
    for t in range(len(ids) - 1):
        mixed = float(p[t, ids[t + 1]])
        remembered = range(max(t - size, 0), t)
        if remembered:
            weights = {i: math.exp(how.sharpness * float(h[t, 0] @ h[i, 0])) for i in remembered}
            of_word = sum(w for i, w in weights.items() if ids[i + 1] == ids[t + 1])
            mixed = 0.6 * mixed + 0.4 * of_word / sum(weights.values())
        total -= math.log(mixed)
    found = evaluate_adaptively(model, tokens, cache=how)
    assert found.nats_per_token == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found.method.endswith(f"neural cache ({size:,} tokens, weight 0.4, sharpness 0.7)")


@pytest.mark.parametrize("segment", [1, 3, 100])
def test_sequences_are_read_from_a_fresh_state(model, tokens, segment):
    tokens[-1] = EOS
    plain = evaluate(model, tokens, eos_id=EOS)
    slow = DynamicEvaluation("sgd", learning_rate=1e-12, segment=segment)
    found = evaluate_adaptively(model, tokens, dynamic=slow, eos_id=EOS)
    assert found.nats_per_token == pytest.approx(plain.nats_per_token, rel=1e-5)
    assert found.perplexity_without_eos == pytest.approx(plain.perplexity_without_eos, rel=1e-5)
    assert (found.tokens, found.sequences) == (plain.tokens, plain.sequences)


def test_a_text_that_repeats_is_learned(model):
    tokens = np.tile(np.random.default_rng(3).integers(0, SIZE, 30), 20)
    plain = evaluate(model, tokens).nats_per_token
    dynamic = DynamicEvaluation(learning_rate=0.01)
    for options in ({"dynamic": dynamic, "training": tokens}, {"cache": NeuralCache(100, 0.5, 30.0)}):
        assert evaluate_adaptively(model, tokens, **options).nats_per_token < plain - 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicEvaluation("rmsprop"), "unknown rule of dynamic evaluation 'rmsprop'; did you mean 'rms'"),
        (lambda: DynamicEvaluation("sgd", 0.0), "--dynamic-lr 0.0: expected a number above 0"),
        (lambda: DynamicEvaluation(decay=2), "--dynamic-decay 2: expected a share from 0 to 1"),
        (lambda: DynamicEvaluation(segment=0), "--segment 0: expected a number of tokens"),
        (lambda: NeuralCache(0), "--cache 0: expected"),
        (lambda: NeuralCache(weight=1.0), "--cache-weight 1.0: expected"),
        (lambda: NeuralCache(sharpness=-1), "--cache-sharpness -1: expected"),
    ],
)
def test_what_cant_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_what_a_text_or_a_model_must_be(model, tokens):
    with pytest.raises(InputError, match="1 tokens to evaluate on"):
        evaluate_adaptively(model, tokens[:1])
    with pytest.raises(InputError, match="measures gradients on training text, and none was given"):
        evaluate_adaptively(model, tokens, dynamic=DynamicEvaluation())
    mlp = LanguageModel(ModelConfig(vocabulary_size=SIZE, cell="mlp", hidden_size=4))
    with pytest.raises(InputError, match="an mlp has none"):
        evaluate_adaptively(mlp, tokens, cache=NeuralCache())
    assert evaluate_adaptively(mlp, tokens, dynamic=DynamicEvaluation("sgd")).tokens == 82
