"""Locked dropout holds still within a window, embedding dropout hides tokens, and a stack with it is the stack."""

import pytest
import torch

import throughtime
from throughtime import InputError
from throughtime.lm import LanguageModel, ModelConfig
from throughtime.lm.dropout import Dropout, LockedDropout, LockedStack, embedding_mask


def test_elements_are_dropped_one_by_one():
    x = torch.ones(300, 50, 7, requires_grad=True)
    torch.manual_seed(1)
    y = Dropout(0.3)(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (y == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert (y[1:] == y[:-1]).float().mean() == pytest.approx(
        0.3**2 + 0.7**2, abs=0.01
    )  # steps don't know of each other
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.3)(x), y)
    assert torch.equal(Dropout(0.3).eval()(x), x)


def test_one_mask_for_all_steps():
    x = torch.ones(30, 50, 40)
    y = LockedDropout(0.3)(x)
    assert torch.equal(y, y[:1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert y.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(LockedDropout(0.3).eval()(x), x)


def test_whole_rows_of_an_embedding_are_hidden():
    mask = embedding_mask(2000, 0.25, torch.ones(1))
    assert mask.shape == (2000, 1)
    assert (mask == 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert mask.max() == pytest.approx(1 / 0.75)


@pytest.mark.parametrize("kind", [throughtime.RNN, throughtime.LSTM, throughtime.GRU])
def test_a_stack_is_the_layer_it_is_made_of(kind):
    whole = kind(5, 8, num_layers=3)
    parts = [kind(5 if place == 0 else 8, 8) for place in range(3)]
    for place, part in enumerate(parts):
        part.load_state_dict(
            {name: getattr(whole, name.replace("l0", f"l{place}")) for name, _ in part.named_parameters()}
        )
    stack = LockedStack(parts, 0.5).eval()
    x, lengths = torch.randn(7, 4, 5), torch.tensor([7, 0, 3, 5])
    expected, state = whole(x, lengths=lengths)
    output, final = stack(x, lengths=lengths)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(final, state)
    torch.testing.assert_close(stack(x, final)[0], whole(x, state)[0])


@pytest.mark.parametrize("cell", ["lstm", "gru", "mlp"])
@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"embedding_dropout": 0.5}, {"dropout": 0.3, "embedding_dropout": 0.3}]
)
def test_it_acts_only_in_training(cell, options):
    config = ModelConfig(11, cell, hidden_size=64, num_layers=2, embedding_size=16, locked=True, **options)
    model = LanguageModel(config)
    ids = torch.randint(0, 11, (5, 3))
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])
    first, state = model(ids[:2])
    second, _ = model(ids[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), model(ids)[0])


def test_a_hidden_token_has_no_gradient_and_the_others_do():
    model = LanguageModel(ModelConfig(40, hidden_size=8, embedding_size=6, embedding_dropout=0.5))
    model(torch.arange(40)[:, None])[0].sum().backward()
    hidden = (model.embedding.weight.grad == 0).all(1)
    assert 8 <= int(hidden.sum()) <= 32


def test_what_cant_be():
    with pytest.raises(InputError, match="--embedding-dropout needs an embedding"):
        ModelConfig(5, embedding_dropout=0.1)
    with pytest.raises(InputError, match=r"embedding_dropout = 1\.0: expected a probability"):
        ModelConfig(5, embedding_size=4, embedding_dropout=1.0)
