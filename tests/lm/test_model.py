"""The language model's shapes, state and options."""

from dataclasses import replace

import pytest
import torch

from throughtime import InputError
from throughtime.layers import Recurrent
from throughtime.lm import LanguageModel, ModelConfig, cell_names
from throughtime.lm.model import device_named


@pytest.mark.parametrize("cell", cell_names())
@pytest.mark.parametrize("options", [{}, {"embedding_size": 6}, {"num_layers": 2, "dropout": 0.5}])
def test_carried_state_makes_pieces_equal_the_whole(cell, options):
    model = LanguageModel(ModelConfig(vocabulary_size=11, cell=cell, hidden_size=8, **options)).eval()
    ids = torch.randint(0, 11, (9, 2))
    whole, last = model(ids)
    first, state = model(ids[:4])
    second, end = model(ids[4:], state)
    assert whole.shape == (9, 2, 11)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for a, e in zip(end, last, strict=True):
        torch.testing.assert_close(a, e)
    assert len(last) == (2 if cell == "lstm" else 1)


def test_one_hot_input_is_a_row_of_the_input_weights():
    model = LanguageModel(ModelConfig(vocabulary_size=5, cell="rnn", hidden_size=3))
    layer = model.recurrent
    logits, (h,) = model(torch.tensor([[2]]))
    expected = torch.tanh(layer.weight_ih_l0[:, 2] + layer.bias_ih_l0 + layer.bias_hh_l0)
    torch.testing.assert_close(h[0, 0], expected)
    torch.testing.assert_close(logits[0, 0], model.output.weight @ expected + model.output.bias)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("embedding_size", [0, 6])
def test_ids_stand_for_the_vectors_that_they_choose(cell, embedding_size):
    """Logits and every gradient equal those of one-hot or embedded vectors, given to the layers as floats."""
    model = LanguageModel(ModelConfig(vocabulary_size=11, cell=cell, hidden_size=8, embedding_size=embedding_size))
    ids = torch.randint(0, 11, (9, 2))
    x = torch.nn.functional.one_hot(ids, 11).float() if model.embedding is None else model.embedding(ids)
    results = [model(ids)[0], model.output(model.recurrent(x)[0])]
    torch.testing.assert_close(*results)
    for a, e in zip(*(torch.autograd.grad(r.square().sum(), list(model.parameters())) for r in results), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("embedding", [8, 6])
def test_tied_weights_are_one_tensor(embedding):
    config = ModelConfig(vocabulary_size=11, hidden_size=8, embedding_size=embedding, tied=True)
    model = LanguageModel(config)
    assert model.embedding is not None
    assert model.output.weight is model.embedding.weight
    assert (model.projection is None) == (embedding == 8)
    untied = LanguageModel(ModelConfig(vocabulary_size=11, hidden_size=8, embedding_size=embedding))
    saved = 11 * 8 - (0 if embedding == 8 else 8 * embedding)
    assert untied.parameter_count - model.parameter_count == saved
    model(torch.zeros(3, 2, dtype=torch.int64))[0].sum().backward()
    assert model.output.weight.grad is not None


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru", "mlp"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("embedding", [0, 7, 6])
def test_parameters_are_counted_without_making_them(cell, layers, embedding):
    variants = [{}, {"dropout": 0.5, "locked": True}]
    variants += [{"tied": True}] if embedding else []
    variants += [{"layer_norm": True}, {"layer_norm": True, "dropout": 0.1, "locked": True}] if cell != "mlp" else []
    for more in variants:
        config = ModelConfig(11, cell, hidden_size=6, num_layers=layers, embedding_size=embedding, window=3, **more)
        assert config.parameter_count == LanguageModel(config).parameter_count


def test_dropout_acts_only_in_training():
    model = LanguageModel(ModelConfig(vocabulary_size=11, hidden_size=64, dropout=0.5))
    ids = torch.zeros(3, 2, dtype=torch.int64)
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_it_starts_with_orthogonal_recurrence_and_inputs_that_are_heard():
    layer = LanguageModel(ModelConfig(vocabulary_size=50, hidden_size=32)).recurrent
    for block in layer.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block @ block.T, torch.eye(32), atol=1e-5, rtol=0)
    assert 0.9 < layer.weight_ih_l0.std() < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "lstn"}, "unknown cell 'lstn'; did you mean 'lstm'"),
        ({"hidden_size": 0}, "hidden_size = 0: expected a whole number, at least 1"),
        ({"num_layers": -1}, "num_layers = -1: expected"),
        ({"embedding_size": -1}, "embedding_size = -1: expected"),
        ({"hidden_size": 2.5}, "hidden_size = 2.5: expected a whole number"),
        ({"dropout": 1.0}, "dropout = 1.0: expected a probability"),
        ({"tied": True}, "--tied needs an embedding"),
    ],
)
def test_shapes_that_cant_be(options, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(vocabulary_size=5, **options)


def test_devices():
    assert device_named("cpu").type == "cpu"
    assert device_named("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cudaa", "xpu:7"):
        with pytest.raises(InputError, match=f"--device {name}: can't be used here; expected one of auto, cpu"):
            device_named(name)


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("locked", [False, True])
def test_recurrent_weights_are_dropped_while_training(cell, locked):
    torch.manual_seed(0)
    config = ModelConfig(5, cell, hidden_size=6, num_layers=2, dropout=1e-9, locked=locked, weight_drop=0.5)
    model, ids = LanguageModel(config), torch.zeros(8, 2, dtype=torch.int64)
    assert not torch.allclose(model(ids)[0], model(ids)[0])
    assert torch.equal(model.eval()(ids)[0], model(ids)[0])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_activation_regularisation_is_its_formula(cell):
    """α mean(ĥ²) + β mean((h_t − h_{t−1})²), only while training (Merity et al., 2017)."""
    config = ModelConfig(5, cell, hidden_size=6, dropout=0.5, ar=2.0, tar=3.0)
    model, plain = LanguageModel(config), LanguageModel(replace(config, ar=0.0, tar=0.0))
    plain.load_state_dict(model.state_dict())
    ids, targets = torch.randint(0, 5, (2, 7, 3))
    h, _ = model.hidden(ids)
    torch.manual_seed(1)
    dropped = model.dropout(h)
    torch.manual_seed(1)
    loss = model.loss(h, targets)
    torch.manual_seed(1)
    expected = plain.loss(h, targets) + 2 * (dropped**2).mean() + 3 * ((h[1:] - h[:-1]) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    assert loss > plain.loss(h, targets) + 0.1
    torch.testing.assert_close(model.eval().loss(h, targets), plain.eval().loss(h, targets))
    short = targets.clone()
    short[4:, 1:] = -100  # rows that end: what is past it counts in no mean
    model.train().dropout.p = plain.train().dropout.p = 0.0
    here = torch.tensor([[True, True, True]] * 4 + [[True, False, False]] * 3)
    expected = plain.loss(h, short) + 2 * h[here].square().mean() + 3 * h.diff(dim=0)[here[1:]].square().mean()
    torch.testing.assert_close(model.loss(h, short), expected)
    assert torch.isfinite(model.train().loss(h[:1], targets[:1]))  # a window of one step has no change


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_regularisation_reaches_every_layer(cell, locked):
    given = {"layer_norm": True, "zoneout": 0.1, "recurrent_dropout": 0.2, "weight_drop": 0.3}
    config = ModelConfig(5, cell, hidden_size=6, num_layers=2, dropout=0.1, locked=locked, **given)
    layers = [part for part in LanguageModel(config).modules() if isinstance(part, Recurrent)]
    assert sum(layer.num_layers for layer in layers) == 2
    for layer in layers:
        assert {name: getattr(layer, name) for name in given} == given
