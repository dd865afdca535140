"""The reference against torch.autograd, numeric gradients and torch.nn, all in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from throughtime.cells import CELLS, Parameters, readout, sequence

TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}


def random_parameters(name: str, inputs: int, hidden: int, bias: bool = True, projection: int = 0) -> Parameters:
    rows, width = CELLS[name].spec.gates * hidden, projection or hidden
    shapes = [(rows, inputs), (rows, width)] + [(rows,), (rows,)] * bias + [(projection, hidden)] * (projection > 0)
    return Parameters.from_list([torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes])


def random_state(name: str, batch: int, hidden: int, projection: int = 0) -> tuple[Tensor, ...]:
    widths = [projection or hidden, hidden][: len(CELLS[name].spec.states)]
    return tuple(torch.randn(batch, width, dtype=torch.float64, requires_grad=True) for width in widths)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_step_backward_is_the_derivative_of_step(name, bias):
    cell = CELLS[name]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    state, parameters = random_state(name, 3, 5), random_parameters(name, 4, 5, bias)
    after, saved = cell.step(x, state, parameters)
    grad_after = tuple(torch.randn_like(s) for s in after)
    gradient = cell.step_backward(grad_after, saved, parameters)
    expected = torch.autograd.grad(after, (x, *state, *parameters.to_list()), grad_after)
    actual = (gradient.x, *gradient.state, *gradient.parameters.to_list())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.linearise])
def test_the_factors_of_a_step_are_its_derivative(name):
    cell, width = CELLS[name], 5
    state, parameters = random_state(name, 3, width), random_parameters(name, 4, width)
    after, saved = cell.step(torch.randn(3, 4, dtype=torch.float64), state, parameters)
    grad_after = tuple(torch.randn_like(s) for s in after)
    gradient = cell.step_backward(grad_after, saved, parameters)
    assert cell.linearise is not None
    recurrent, inputs, direct = cell.linearise(saved)

    def grad_a(factors):
        return sum(g[:, None] * f for g, f in zip(grad_after, factors, strict=True)).flatten(1)

    torch.testing.assert_close(grad_a(inputs or recurrent) @ parameters.weight_ih, gradient.x, **TOLERANCE)
    for j, expected in enumerate(gradient.state):
        found = grad_a(recurrent) @ parameters.weight_hh if j == 0 else torch.zeros_like(expected)
        for g, row in zip(grad_after, direct, strict=True):
            found = found if row[j] is None else found + g * row[j]
        torch.testing.assert_close(found, expected, **TOLERANCE)


@given(
    name=st.sampled_from(list(CELLS)),
    steps=st.integers(1, 6),
    batch=st.integers(1, 4),
    hidden=st.sampled_from([1, 2, 7]),
    project=st.booleans(),
    bias=st.booleans(),
    ragged=st.booleans(),
    resets=st.booleans(),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backpropagation_through_time_is_autograd(
    *, name, steps, batch, hidden, project, bias, ragged, resets, reverse, seed
):
    torch.manual_seed(seed)
    cell = CELLS[name]
    projection = hidden - 1 if project and name == "lstm" else 0
    parameters = random_parameters(name, 3, hidden, bias, projection)
    state = random_state(name, batch, hidden, projection)
    x = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
    reset = torch.rand(steps, batch) < 0.4 if resets else None

    result = sequence.forward(cell, x, state, parameters, lengths, reset, reverse)
    grad_outputs = torch.randn_like(result.outputs)
    grad_final = tuple(torch.randn_like(s) for s in result.final_state)
    expected = torch.autograd.grad(
        (result.outputs, *result.final_state),
        (x, *state, *parameters.to_list()),
        (grad_outputs, *grad_final),
        allow_unused=True,
    )
    gradient = sequence.backward(cell, grad_outputs, grad_final, result.saved, parameters, lengths, reset, reverse)
    for a, e in zip((gradient.inputs, *gradient.initial_state, *gradient.parameters.to_list()), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, **TOLERANCE)


@pytest.mark.parametrize("name", CELLS)
def test_numeric_gradients_agree(name):
    parameters, state = random_parameters(name, 2, 3), random_state(name, 2, 3)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    lengths, reset = torch.tensor([4, 2]), torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0]], dtype=torch.bool)

    def run(x, *tensors):
        initial, weights = tensors[: len(state)], Parameters.from_list(list(tensors[len(state) :]))
        result = sequence.forward(CELLS[name], x, initial, weights, lengths, reset)
        return result.outputs, *result.final_state

    assert torch.autograd.gradcheck(run, (x, *state, *parameters.to_list()))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("rnn_tanh", lambda: nn.RNN(3, 5)),
        ("rnn_relu", lambda: nn.RNN(3, 5, nonlinearity="relu")),
        ("lstm", lambda: nn.LSTM(3, 5)),
        ("lstm", lambda: nn.LSTM(3, 5, proj_size=2)),
        ("gru", lambda: nn.GRU(3, 5)),
    ],
)
def test_the_equations_are_torchs(name, layer):
    layer = layer().double()
    parameters = Parameters.from_list([p.detach() for p in layer.parameters()])
    projection = getattr(layer, "proj_size", 0)
    state = tuple(s.detach() for s in random_state(name, 4, 5, projection))
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    result = sequence.forward(CELLS[name], x, state, parameters)
    hx = tuple(s[None] for s in state)
    output, final = layer(x, hx if len(hx) == 2 else hx[0])
    final = final if isinstance(final, tuple) else (final,)
    torch.testing.assert_close(result.outputs, output, **TOLERANCE)
    for a, e in zip(result.final_state, final, strict=True):
        torch.testing.assert_close(a, e[0], **TOLERANCE)


def test_reset_before_gru_is_the_textbooks():
    """Written out once more with loops over units, from Cho et al. (2014)."""
    torch.manual_seed(3)
    p = random_parameters("gru_reset_before", 2, 3)
    (h,) = random_state("gru_reset_before", 1, 3)
    x = torch.randn(1, 2, dtype=torch.float64)
    (actual,), _ = CELLS["gru_reset_before"].step(x, (h,), p)
    assert p.bias_ih is not None
    assert p.bias_hh is not None

    def gate(row: int, state: Tensor) -> Tensor:
        return p.weight_ih[row] @ x[0] + p.bias_ih[row] + p.weight_hh[row] @ state + p.bias_hh[row]

    r = torch.stack([torch.sigmoid(gate(j, h[0])) for j in range(3)])
    for j in range(3):
        z = torch.sigmoid(gate(3 + j, h[0]))
        n = torch.tanh(gate(6 + j, r * h[0]))
        torch.testing.assert_close(actual[0, j], (1 - z) * n + z * h[0, j], **TOLERANCE)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_reset_makes_two_sequences_of_one(name, reverse):
    parameters, state = random_parameters(name, 3, 4), random_state(name, 1, 4)
    x = torch.randn(7, 1, 3, dtype=torch.float64)
    reset = torch.zeros(7, 1, dtype=torch.bool)
    reset[3] = True
    whole = sequence.forward(CELLS[name], x, state, parameters, None, reset, reverse)
    first = sequence.forward(CELLS[name], x[:3], state, parameters, reverse=reverse)
    second = sequence.forward(CELLS[name], x[3:], state, parameters, reverse=reverse)
    torch.testing.assert_close(whole.outputs, torch.cat([first.outputs, second.outputs]), **TOLERANCE)
    for a, e in zip(whole.final_state, (first if reverse else second).final_state, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_each_row_is_its_own_sequence_whatever_stands_in_the_padding(name, reverse):
    parameters, state = random_parameters(name, 3, 4), random_state(name, 3, 4)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    lengths = torch.tensor([4, 0, 6])
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    result = sequence.forward(CELLS[name], x, state, parameters, lengths, None, reverse)
    for row, length in enumerate(lengths):
        initial = tuple(s[row : row + 1] for s in state)
        assert torch.equal(result.outputs[length:, row], torch.zeros(6 - int(length), 4, dtype=torch.float64))
        if length == 0:
            final = initial
        else:
            alone = sequence.forward(CELLS[name], x[:length, row : row + 1], initial, parameters, reverse=reverse)
            torch.testing.assert_close(result.outputs[:length, row], alone.outputs[:, 0], **TOLERANCE)
            final = alone.final_state
        for a, e in zip(result.final_state, final, strict=True):
            torch.testing.assert_close(a[row], e[0], **TOLERANCE)
    gradient = sequence.backward(
        CELLS[name],
        torch.ones_like(result.outputs),
        tuple(torch.ones_like(s) for s in state),
        result.saved,
        parameters,
        lengths,
        None,
        reverse,
    )
    assert all(torch.isfinite(g).all() for g in gradient.parameters.to_list())


def test_readout_backward_is_its_derivative():
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([5, 0, 2])
    y, loss, saved = readout.step(h, weight, bias, target)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(y, target, reduction="sum"), **TOLERANCE)
    gradient = readout.step_backward(torch.ones((), dtype=torch.float64), saved, weight, bias)
    for a, e in zip(gradient, torch.autograd.grad(loss, (h, weight, bias)), strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


def test_the_gradient_of_the_whole_is_the_sum_over_the_steps():
    """∂L/∂W = Σ_t ∂L_t/∂W, each ∂L_t/∂W carried back on its own."""
    parameters, state = random_parameters("rnn_tanh", 3, 4), random_state("rnn_tanh", 2, 4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    result = sequence.forward(CELLS["rnn_tanh"], x, state, parameters)
    grad_outputs, nothing = torch.randn_like(result.outputs), (torch.zeros_like(state[0]),)

    def weight_gradient(grad: Tensor) -> Tensor:
        return sequence.backward(CELLS["rnn_tanh"], grad, nothing, result.saved, parameters).parameters.weight_hh

    itemised = []
    for t in range(5):
        only_t = torch.zeros_like(grad_outputs)
        only_t[t] = grad_outputs[t]
        itemised.append(weight_gradient(only_t))
    torch.testing.assert_close(torch.stack(itemised).sum(0), weight_gradient(grad_outputs), **TOLERANCE)


@pytest.mark.parametrize("count", [1, 6])
def test_parameter_lists_of_other_lengths_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} parameter tensors; expected weight_ih"):
        Parameters.from_list([torch.zeros(1)] * count)


def test_shapes_are_checked_while_the_suite_runs():
    parameters, state = random_parameters("lstm", 3, 4), random_state("lstm", 2, 4)
    with pytest.raises(Exception, match=r"Type-check error|violates"):
        CELLS["lstm"].step(torch.randn(5, 2, 3, dtype=torch.float64), state, parameters)
