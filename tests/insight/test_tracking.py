"""What training is told of its gradients is what the instruments measure, and telling it changes nothing."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from throughtime import insight
from throughtime.insight.tracking import ROWS
from throughtime.lm import LanguageModel, ModelConfig


def make(cell="lstm", **more):
    torch.manual_seed(1)
    return LanguageModel(ModelConfig(vocabulary_size=7, cell=cell, hidden_size=6, **more)).double()


def window(steps=15, batch=4):
    ids = torch.randint(7, (steps + 1, batch))
    return ids[:-1], ids[1:]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_what_the_instruments_measure(cell, layers):
    model, (inputs, targets) = make(cell, num_layers=layers), window()
    _, state = model(*window()[:1])
    flow = insight.track_gradients(model, inputs, targets, tuple(part.detach() for part in state))

    rows = slice(0, ROWS)
    start = tuple(part.detach()[:, rows].contiguous() for part in state)
    recorded = insight.record_model(
        model,
        (inputs[:, rows], start),
        lambda y: cross_entropy(y[0].flatten(0, 1), targets[:, rows].flatten(), reduction="none"),
    )
    lag = insight.lag_matrix(*recorded)[-1]
    assert flow.horizon == min(insight.horizon(lag, 1e-3).lag, 15)
    assert flow.decay == pytest.approx(insight.tail_decay(lag.curve))
    kappa = insight.cancellation(*recorded)[-1]
    assert flow.cancellation == pytest.approx(kappa.nanmedian().item())


def test_rows_that_end_count_as_far_as_they_go():
    model, (inputs, targets) = make("gru"), window()
    lengths, short = torch.tensor([9, 15, 15, 15]), targets.clone()
    short[9:, 0] = -100
    flow = insight.track_gradients(model, inputs, short, None, lengths)
    spoilt = inputs.clone()
    spoilt[9:, 0] = 3
    assert flow == insight.track_gradients(model, spoilt, short, None, lengths)
    assert flow != insight.track_gradients(model, inputs, targets)


def test_nothing_is_changed():
    model, (inputs, targets) = make("lstm", num_layers=2, dropout=0.5).train(), window()
    model(inputs)[0].sum().backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    insight.track_gradients(model, inputs, targets)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters(), strict=True))
    assert torch.equal(before[2], torch.get_rng_state())
    assert model.training


def test_what_cannot_be_told_is_none():
    inputs, targets = window(steps=1)
    flow = insight.track_gradients(make("rnn"), inputs, targets)
    assert (flow.horizon, flow.decay, flow.cancellation) == (1, None, pytest.approx(1))
