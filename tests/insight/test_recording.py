import pytest
import torch
from insight.test_gradient_flow import CLOSE
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime
from throughtime import insight
from throughtime.errors import InputError


class Tagger(nn.Module):
    def __init__(self, recurrent, width=5, packed=False):
        super().__init__()
        self.recurrent, self.output, self.dropout = recurrent, nn.Linear(width, 4), nn.Dropout(0.5)
        self.packed = packed

    def forward(self, x):
        output = self.recurrent(x)[0]
        return self.output(self.dropout(output.data if self.packed else output))


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(3, 5), nn.RNN(3, 6)

    def forward(self, x):
        return torch.cat([self.a(x)[0], self.b(x)[0]], 2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.GRU(3, 3)

    def forward(self, x):
        return self.a(self.a(x)[0])[0]


class Stacked(nn.Module):
    """Two modules of one layer each, as they are often put together, with dropout in between."""

    def __init__(self, both):
        super().__init__()
        self.a, self.b, self.dropout = nn.LSTM(3, 5), nn.LSTM(5, 5), nn.Dropout(0.5)
        for name, weight in both.named_parameters():
            part = self.a if "_l0" in name else self.b
            setattr(part, name.replace("_l1", "_l0"), nn.Parameter(weight.detach().clone()))

    def forward(self, x):
        return self.b(self.dropout(self.a(x)[0]))


def test_a_stack_of_modules_is_a_stack_of_layers():
    both = nn.LSTM(3, 5, 2)
    x, weight = torch.randn(7, 3, 3), torch.randn(7, 3, 5)
    recorded = insight.record_model(Stacked(both), (x,), lambda y: (y[0] * weight).sum(-1))
    one = insight.lag_matrix(insight.record(both, x), weight)
    several = insight.lag_matrix(*recorded)
    assert [m.lane for m in several] == ["layer 0", "layer 1"]
    for a, b in zip(one, several, strict=True):
        torch.testing.assert_close(a.norms, b.norms)


def losses_of(tags):
    return lambda y: nn.functional.cross_entropy(y.flatten(0, -2), tags, reduction="none")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, throughtime.LSTM, nn.GRU])
def test_the_losses_of_a_model_reach_the_recording(kind, batch_first):
    """The itemised gradients of the recurrent weights add up to what the model's own backward pass gives."""
    model = Tagger(kind(3, 5, 2, batch_first=batch_first).double()).double()
    x, tags = torch.randn(7, 6, 3, dtype=torch.float64), torch.randint(4, (42,))
    recorded = insight.record_model(model, (x,), losses_of(tags))
    assert recorded.grad_outputs.shape == ((6, 7, 5) if batch_first else (7, 6, 5))
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    sums = insight.lag_gradients(recorded.recording, recorded.grad_outputs)
    losses_of(tags)(model.eval()(x)).sum().backward()
    for row, lane in zip(model.recurrent.all_weights, sums, strict=True):
        for parameter, g in zip(row, lane.to_list(), strict=True):
            torch.testing.assert_close(g.sum(0), parameter.grad, **CLOSE)


def test_a_packed_sequence_is_read():
    model = Tagger(nn.GRU(3, 5).double(), packed=True).double()
    x, lengths = torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([2, 6, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    tags = torch.randint(4, (12,))
    recorded = insight.record_model(model, (packed,), losses_of(tags))
    (sums,) = insight.lag_gradients(recorded.recording, recorded.grad_outputs)
    losses_of(tags)(model.eval()(packed)).sum().backward()
    torch.testing.assert_close(sums.weight_hh.sum(0), model.recurrent.weight_hh_l0.grad, **CLOSE)


@pytest.mark.parametrize("embedded", [False, True])
def test_token_ids_are_recorded_as_the_vectors_they_stand_for(embedded):
    layer = throughtime.GRU(5, 4, 2)
    embedding = torch.randn(7, 5) if embedded else None
    ids, lengths = torch.randint(0, 5, (6, 3)), torch.tensor([6, 0, 4])
    x = torch.nn.functional.one_hot(ids, 5).float() if embedding is None else embedding[ids]
    ids[4:, 2] = 99
    recorded = insight.record(layer, ids, lengths=lengths, embedding=embedding)
    assert torch.equal(recorded.outputs, insight.record(layer, x, lengths=lengths).outputs)
    torch.testing.assert_close(recorded.outputs, layer(ids, lengths=lengths, embedding=embedding)[0].detach())


def test_which_layer_is_meant():
    with pytest.raises(InputError, match="Linear called no recurrent layer"):
        insight.record_model(nn.Linear(3, 3), (torch.ones(3),), lambda y: y)
    x = torch.randn(4, 2, 3)
    with pytest.raises(InputError, match="no stack; say which one with layer="):
        insight.record_model(Siblings(), (x,), lambda y: y)
    with pytest.raises(InputError, match="more than once"):
        insight.record_model(Twice(), (x,), lambda y: y)
    siblings = Siblings()
    recorded = insight.record_model(siblings, (x,), lambda y: y.sum(-1), layer=siblings.b)
    assert recorded.recording.outputs.shape == (4, 2, 6)
    model = Tagger(nn.GRU(3, 5))
    recorded = insight.record_model(model, (torch.randn(4, 2, 3),), lambda y: y.sum(-1), layer=model.recurrent)
    assert recorded.grad_outputs.shape == (4, 2, 5)


def test_a_hook_does_not_stay():
    model = Tagger(nn.GRU(3, 5))
    with pytest.raises(RuntimeError):
        insight.record_model(model, (torch.randn(4, 2, 9),), lambda y: y.sum(-1))
    assert not model.recurrent._forward_hooks
    assert model.training


def test_the_states_are_the_layers():
    layer = throughtime.LSTM(3, 5).double()
    x, lengths = torch.randn(6, 2, 3, dtype=torch.float64), torch.tensor([6, 3])
    state = torch.randn(1, 2, 5, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    output, (h, c) = layer(x, state, lengths=lengths)
    recording = insight.record(layer, x, state, lengths=lengths)
    torch.testing.assert_close(recording.outputs, output, **CLOSE)
    (lane,) = recording.lanes
    for part, final in zip(lane.states, (h, c), strict=True):
        torch.testing.assert_close(part[-1, 0], final[0, 0], **CLOSE)
        torch.testing.assert_close(part[2, 1], final[0, 1], **CLOSE)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: insight.record(nn.Linear(3, 3), torch.ones(4, 2, 3)), "a Linear can't be recorded"),
        (lambda: insight.record(nn.GRU(3, 5), torch.ones(4, 3)), "input has 2 dimensions; expected 3"),
        (lambda: insight.record(nn.GRU(3, 5), torch.ones(4, 2, 2)), "input has width 2; expected input_size = 3"),
        (lambda: insight.record(nn.GRU(3, 5), torch.ones(0, 2, 3)), "no time steps"),
        (
            lambda: insight.record(nn.GRU(3, 5), torch.ones(4, 2, 3), lengths=torch.tensor([5, 1])),
            r"lengths \[5, 1\]: expected one for each of 2 rows, from 0 to T = 4",
        ),
        (lambda: insight.record(nn.GRU(3, 5), torch.ones(4, 2, 3), reset=torch.ones(4, 2)), "expected bool"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_drop"])
def test_what_training_mode_draws_is_not_recorded_as_if_it_did_not(name):
    layer = throughtime.LSTM(3, 5, **{name: 0.5})
    x = torch.randn(6, 2, 3)
    with pytest.raises(InputError, match=rf"{name}=0.5 in training mode draws anew .* call its eval\(\) first"):
        insight.record(layer, x)
    torch.testing.assert_close(insight.record(layer.eval(), x).outputs, layer(x)[0].detach())
    model = Tagger(layer).train()  # which is put in eval mode, and back
    insight.record_model(model, (x,), lambda y: y.sum(-1))
    assert layer.training


@pytest.mark.parametrize("kind", [throughtime.LSTM, throughtime.GRU])
def test_a_part_of_a_recording_is_what_recording_that_part_gives(kind):
    layer, x = kind(3, 5, 2).double(), torch.randn(9, 4, 3, dtype=torch.float64)
    part, alone = insight.record(layer, x).part(slice(2, 3), slice(6)), insight.record(layer, x[:6, 2:3])
    gradient = torch.randn(6, 1, 5, dtype=torch.float64)
    for one, other in zip(insight.lag_matrix(part, gradient), insight.lag_matrix(alone, gradient), strict=True):
        torch.testing.assert_close(one.norms, other.norms, **CLOSE)
    torch.testing.assert_close(part.outputs, alone.outputs, **CLOSE)


def denormals(values):
    return int(((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).sum())


def test_denormals_are_taken_for_zero_and_only_while_something_is_measured():
    """They cost many CPUs a hundred cycles each, and nearly all of a measurement's time."""
    layer = throughtime.RNN(3, 8, 2, nonlinearity="relu", bias=False)
    for name, weight in layer.named_parameters():
        torch.nn.init.constant_(weight, 0.05 if "hh" in name else 0.3)
    x = torch.zeros(120, 2, 3)
    x[:3] = 1  # from which the state falls by 0.4 a step, to 1e-48
    recording = insight.record(layer, x)
    assert denormals(recording.outputs) == 0
    gradient = torch.zeros_like(recording.outputs)
    gradient[-1] = 1
    for matrix in insight.lag_matrix(recording, gradient):  # of a deep stack, without the native kernel
        assert denormals(matrix.norms) == 0
    for total in insight.total_adjoint(recording, gradient):
        assert denormals(total[0]) == 0
    assert denormals(insight.jacobian_product(recording.lanes[0], 119, 110)) == 0
    (lane,) = insight.record(throughtime.LSTM(3, 4), torch.randn(200, 1, 3)).lanes
    assert denormals(insight.carousel(lane)) == 0
    assert (torch.tensor([1e-38]) / 10).item() > 0


def test_resets_are_recorded_where_they_go_back_to_the_initial_state():
    """The layers' own resets go to zeros, which with an initial state is another thing."""
    layer, x, reset = throughtime.GRU(3, 4), torch.randn(5, 2, 3), torch.rand(5, 2) < 0.5
    hx = torch.randn(1, 2, 4)
    for given in ({}, {"hx": torch.zeros(1, 2, 4)}, {"hx": hx, "reset_to": hx}):
        recorded = insight.record(layer, x, reset=reset, **given)
        torch.testing.assert_close(recorded.outputs, layer(x, reset=reset, **given)[0])
    for given in ({"hx": hx}, {"reset_to": hx}, {"hx": hx, "reset_to": hx * 2}):
        with pytest.raises(
            InputError, match="resets that go to another state than the rows begin with can't be recorded"
        ):
            insight.record(layer, x, reset=reset, **given)


def test_a_mask_is_recorded_where_it_stands_for_lengths():
    layer, x, mask = throughtime.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    recorded = insight.record(layer, x, mask=mask)
    torch.testing.assert_close(recorded.outputs, layer(x, mask=mask)[0].transpose(0, 1))
    with pytest.raises(InputError, match="a mask that passes over steps can't be recorded"):
        insight.record(layer, x, mask=~mask)
