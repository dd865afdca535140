"""Language models as streams: what they say, what they choose and write, as the model itself does."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import throughtime
from throughtime import InputError
from throughtime.kernels import native
from throughtime.lm import CharTokenizer, LanguageModel, ModelConfig, Sampling, evaluate, generate
from throughtime.lm import evaluation as evaluation_module
from throughtime.lm import generation as generation_module
from throughtime.lm.streamed import StreamReader
from throughtime.streaming.writing import Writer

pytestmark = pytest.mark.skipif(native.module is None, reason="streams need the kernels")

CONFIGS = {
    "one-hot": {"hidden_size": 33},
    "embedded": {"hidden_size": 33, "embedding_size": 12, "cell": "gru", "num_layers": 2, "dropout": 0.2},
    "tied": {"hidden_size": 33, "embedding_size": 12, "tied": True},
    "locked": {"hidden_size": 20, "embedding_size": 20, "num_layers": 3, "dropout": 0.3, "locked": True, "tied": True},
    "regularised": {
        "hidden_size": 20,
        "layer_norm": True,
        "zoneout": 0.2,
        "weight_drop": 0.3,
        "recurrent_dropout": 0.2,
    },
    "rnn": {"hidden_size": 20, "cell": "rnn", "embedding_size": 7, "embedding_dropout": 0.4},
}
SAMPLINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 1.0},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5, "temperature": 0.7},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 3},
    {"greedy": True},
    {"greedy": True, "repetition_penalty": 3.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.9},
]
WRITTEN = "".join(map(chr, range(33, 73)))


def options_of(sampling):
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}


def sharp_model(vocabulary_size, **shape):
    """A model whose choices differ: fresh ones hardly prefer anything."""
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(vocabulary_size, **shape))
    with torch.no_grad():
        model.output.weight.mul_(6).add_(torch.randn_like(model.output.weight))
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_model_is_streamed_as_it_evaluates(name):
    model = LanguageModel(ModelConfig(vocabulary_size=60, **CONFIGS[name]))
    stream = throughtime.stream(model)  # still in training mode: a stream computes as in eval
    ids = torch.randint(60, (40,))
    model.eval()
    with torch.no_grad():
        expected = model(ids[:, None])[0][:, 0]
    assert torch.allclose(stream.feed(ids), expected, atol=2e-5)


def test_a_fixed_window_is_refused():
    model = LanguageModel(ModelConfig(vocabulary_size=60, cell="mlp", hidden_size=8))
    with pytest.raises(InputError, match="an mlp sees a fixed window and carries no state"):
        throughtime.stream(model)
    tokenizer = CharTokenizer(WRITTEN)
    model = LanguageModel(ModelConfig(tokenizer.vocabulary_size, cell="mlp", hidden_size=8))
    assert len("".join(generate(model, tokenizer, "!", 20, seed=1))) == 20
    with pytest.raises(InputError, match="an mlp sees a fixed window and carries no state"):
        list(generate(model, tokenizer, "!", 20, seed=1, precision="int8"))


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_the_same_chance_chooses_the_same_token(options):
    """The native choice against `Sampling.choose`, on logits of all kinds."""
    sampling, random = Sampling(**options), np.random.default_rng(0)
    layer = nn.Sequential(throughtime.RNN(50, 4), nn.Linear(4, 50))
    stream = throughtime.stream(layer, ids=True)

    class OneChance:
        def __init__(self, chance):
            self.random = lambda: chance

    for number in range(300):
        scale = random.choice([0.1, 1, 5, 50])
        logits = (random.standard_normal(50) * scale).astype(np.float32)
        if number % 5 == 0 and scale >= 1:
            logits = np.round(
                logits
            )  # ties, but not all of them: a sum of equal shares may end on a limit, give or take a rounding
        forbidden = random.random(50) < random.choice([0, 0.3, 0.98])
        history = random.integers(50, size=random.integers(1, 40))
        chance = [1e-9, 1 - 1e-9, random.random()][number % 3]
        choice = Writer(stream, None, **options_of(sampling))._choice
        choice.take(logits)
        choice.see(history)
        found = choice.choose(forbidden, chance)
        masked = torch.from_numpy(logits).masked_fill(torch.from_numpy(forbidden), -torch.inf)
        expected = sampling.choose(masked, OneChance(chance), history.tolist())
        assert found == (-1 if expected is None else expected)


def test_what_is_no_number_is_refused():
    tokenizer = CharTokenizer(WRITTEN)
    model = sharp_model(tokenizer.vocabulary_size, hidden_size=8)
    with torch.no_grad():
        model.output.weight[3, 2] = torch.nan
    for precision in ("float32", "int8"):
        with pytest.raises(InputError, match="no number"):
            list(generate(model, tokenizer, "!", 20, seed=1, precision=precision))


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_the_same_seed_writes_the_same_text(options, monkeypatch):
    tokenizer, seeds = CharTokenizer(WRITTEN), range(3)
    model = sharp_model(tokenizer.vocabulary_size, hidden_size=24, num_layers=2, cell="gru")
    arguments = [(WRITTEN[:5], 150, Sampling(**options), seed) for seed in seeds]
    streamed = [list(generate(model, tokenizer, *given)) for given in arguments]
    monkeypatch.setattr(generation_module, "stream_of", lambda *_: None)
    assert [list(generate(model, tokenizer, *given)) for given in arguments] == streamed


def test_ends_stops_and_alphabets(monkeypatch):
    tokenizer = CharTokenizer(WRITTEN, sequences="line")
    model = sharp_model(tokenizer.vocabulary_size, hidden_size=24)
    stop = WRITTEN[7]
    calls = [
        {"seed": 1},
        {"seed": 2, "stop": [stop]},
        {"seed": 3, "alphabet": WRITTEN[:9]},
        {"seed": 4, "sampling": Sampling(no_repeat_ngram=1), "alphabet": WRITTEN[:4]},
    ]
    streamed = ["".join(generate(model, tokenizer, "!", 300, **call)) for call in calls]
    monkeypatch.setattr(generation_module, "stream_of", lambda *_: None)
    assert ["".join(generate(model, tokenizer, "!", 300, **call)) for call in calls] == streamed
    assert stop not in streamed[1]
    assert set(streamed[2]) <= set(WRITTEN[:9])
    assert len(streamed[3]) <= 4


def test_text_comes_piece_by_piece():
    tokenizer = CharTokenizer(WRITTEN)
    model = sharp_model(tokenizer.vocabulary_size, hidden_size=24)
    endless = generate(model, tokenizer, "!", 10**9, seed=1)
    assert len(list(itertools.islice(endless, 1000))) == 1000


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_narrow_weights_write_too(precision):
    tokenizer = CharTokenizer(WRITTEN)
    model = sharp_model(tokenizer.vocabulary_size, hidden_size=24)
    first, second = ("".join(generate(model, tokenizer, "!", 100, seed=1, precision=precision)) for _ in range(2))
    assert len(first) == 100
    assert first == second
    with pytest.raises(InputError, match="unknown precision 'int9'; did you mean 'int8'"):
        list(generate(model, tokenizer, "!", 100, precision="int9"))


def test_a_writer_wants_one_stream_of_ids():
    layer = nn.Sequential(throughtime.RNN(5, 4), nn.Linear(4, 5))
    for stream in (throughtime.stream(layer), throughtime.stream(layer, ids=True, streams=2)):
        with pytest.raises(InputError, match="expected one stream that reads token ids"):
            Writer(stream, None)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_streams_read_a_text_as_the_model_does(cell, monkeypatch):
    model = sharp_model(41, hidden_size=24, cell=cell, num_layers=2)
    tokens = np.random.default_rng(0).integers(1, 41, size=3000)
    sequences = np.where(tokens == 7, 0, tokens)
    sequences[-1] = 0
    monkeypatch.setattr(evaluation_module, "_EXACT", 1000)  # so that there are several streams
    calls = [{"tokens": tokens}, {"tokens": tokens[:500]}, {"tokens": tokens, "cold": 50}]
    calls += [{"tokens": sequences, "eos_id": 0, "unknown_id": 3}, {"tokens": sequences, "eos_id": 0, "window": 5}]
    expected = [evaluate(model, **call) for call in calls]
    monkeypatch.setattr(evaluation_module, "reader_of", lambda model, _, rows: StreamReader(model, "float32", rows))
    for call, exact in zip(calls, expected, strict=True):
        found = evaluate(model, **call)
        assert found.nats_per_token == pytest.approx(exact.nats_per_token, rel=1e-6)
        assert found.unknown == exact.unknown
        assert (found.perplexity_without_eos or 0) == pytest.approx(exact.perplexity_without_eos or 0, rel=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_precision_costs_little(precision):
    model = sharp_model(41, hidden_size=64)
    tokens = np.random.default_rng(0).integers(1, 41, size=2000)
    exact, narrow = (evaluate(model, tokens, precision=name) for name in ("float32", precision))
    assert narrow.nats_per_token != exact.nats_per_token
    assert narrow.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.02)
    assert narrow.method == f"carried state, {precision}"
