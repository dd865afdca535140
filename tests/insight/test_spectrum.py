import math

import pytest
import torch
from insight.reference import unroll
from insight.test_gradient_flow import CLOSE, LAYERS, make

import throughtime
from throughtime import insight
from throughtime.errors import InputError


def lane_of(layer, x, **more):
    return insight.record(layer, x, **more).lanes[0]


def linear(weight, steps=60):
    """A relu network that only ever sees positive numbers: h_t = W h_{t−1} + x_t."""
    weight = torch.tensor(weight, dtype=torch.float64)
    layer = throughtime.RNN(len(weight), len(weight), nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(len(weight)))
        layer.weight_hh_l0.copy_(weight)
    return lane_of(layer, torch.rand(steps, 2, len(weight), dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_jacobian_is_autograds(cell, reverse):
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    layer = make(cell, bidirectional=reverse)
    lane = insight.record(layer, x).lanes[-1]
    states = unroll(cell, layer, x).states[-1]
    before, after = (2, 1) if reverse else (1, 2)
    found = insight.jacobians(lane, [after])[0]
    size = sum(lane.widths)
    joined = torch.cat(states[after], 1)
    for i in range(size):
        grads = torch.autograd.grad(joined[:, i].sum(), states[before], retain_graph=True)
        torch.testing.assert_close(found[:, i], torch.cat(grads, 1), **CLOSE)


def test_a_product_of_jacobians_stops_at_a_reset():
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[2, 1] = True
    lane = lane_of(make("lstm"), torch.randn(5, 2, 3, dtype=torch.float64), reset=reset)
    product = insight.jacobian_product(lane, 3, 3)
    steps = insight.jacobians(lane)
    torch.testing.assert_close(product, steps[3] @ steps[2] @ steps[1], **CLOSE)
    assert product[0].abs().max() > 0
    assert product[1].abs().max() == 0


def test_sizes_of_a_linear_network():
    size = insight.step_size(linear([[0.9, 0.4], [0.0, 0.5]]), [3, 9])
    weight = torch.tensor([[0.9, 0.4], [0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(size.radius, torch.full((2, 2), 0.9, dtype=torch.float64))
    torch.testing.assert_close(size.norm, torch.linalg.matrix_norm(weight, 2).expand(2, 2))
    torch.testing.assert_close(size.mean, (weight.square().sum() / 2).sqrt().expand(2, 2))


def test_exponents_of_a_linear_network_are_the_logarithms_of_its_eigenvalues():
    found = insight.lyapunov_spectrum(linear([[0.9, 0.4, 0.2], [0.0, 0.5, 0.1], [0.0, 0.0, 1.1]], 400), skip=100)
    expected = torch.tensor([math.log(v) for v in (1.1, 0.9, 0.5)], dtype=torch.float64)
    torch.testing.assert_close(found, expected.expand(2, 3), rtol=0, atol=1e-3)


def rotating(gain, angle, steps):
    """Two tanh units whose state goes round in a circle."""
    layer = throughtime.RNN(1, 2, bias=False).double()
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    with torch.no_grad():
        layer.weight_hh_l0.copy_(gain * torch.tensor(turn, dtype=torch.float64))
    start = torch.full((1, 1, 2), 0.4, dtype=torch.float64)
    x = torch.zeros(steps, 1, 1, dtype=torch.float64)
    settled = layer(x, start)[1]  # the transient is over
    return insight.record(layer, x, settled.detach()).lanes[0]


def test_on_a_limit_cycle_the_largest_exponent_is_zero():
    first, second = insight.lyapunov_spectrum(rotating(1.5, 0.5, 3000), skip=200)[0]
    assert abs(first) < 2e-3
    assert second < -0.3


def test_at_a_fixed_point_both_are_negative_and_known():
    """With gain below 1 the state dies out, and the Jacobian is the rotation times the gain."""
    found = insight.lyapunov_spectrum(rotating(0.8, 0.5, 600), skip=100)[0]
    torch.testing.assert_close(found, torch.full((2,), math.log(0.8), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_exponents_run_in_reverse_and_sum_to_the_volume(cell):
    """Σ λ_i = mean ln |det J_t|, in any lane."""
    x = torch.randn(50, 2, 3, dtype=torch.float64)
    for lane in insight.record(make(cell, bidirectional=True), x).lanes:
        volume = torch.linalg.slogdet(insight.jacobians(lane)).logabsdet.mean(0)
        torch.testing.assert_close(insight.lyapunov_spectrum(lane).sum(1), volume, rtol=1e-6, atol=1e-6)
        few = insight.lyapunov_spectrum(lane, 2)
        assert (few[:, 0] > few[:, 1]).all()


def test_the_bound_holds():
    lane = lane_of(make("rnn_tanh"), torch.randn(20, 3, 3, dtype=torch.float64))
    bound = insight.pascanu_bound(lane)
    assert bound.sigma_max == pytest.approx(torch.linalg.matrix_norm(lane.parameters.weight_hh, 2).item())
    assert (insight.step_size(lane).norm <= bound.bound + 1e-12).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lane: insight.pascanu_bound(lane), "the bound is for a simple RNN"),
        (lambda lane: insight.jacobians(lane, [7]), "step 7: expected one of the recorded steps, 0 to 4"),
        (lambda lane: insight.jacobian_product(lane, 1, 3), "lag = 3: expected 1 to 2"),
        (lambda lane: insight.lyapunov_spectrum(lane, 99), "exponents = 99: expected 1 to 5"),
        (lambda lane: insight.lyapunov_spectrum(lane, skip=5), "skip = 5"),
    ],
)
def test_what_does_not_fit_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call(lane_of(make("gru"), torch.randn(5, 2, 3, dtype=torch.float64)))


def test_a_broken_sequence_has_no_exponents():
    lane = lane_of(make("gru"), torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]))
    with pytest.raises(InputError, match="unbroken"):
        insight.lyapunov_spectrum(lane)


@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
def test_exponents_factor_the_product_in_the_order_of_backpropagation(cell):
    """R_1 ⋯ R_T of all steps is the R of (J_T ⋯ J_1)ᵀ Q: J_tᵀ applied forward in time would be another product."""
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for lane in insight.record(make(cell, hidden=3, bidirectional=True), x).lanes:
        size = sum(lane.widths)
        generator = torch.Generator().manual_seed(0)
        start = torch.linalg.qr(torch.randn(2, size, size, generator=generator, dtype=torch.float64)).Q
        whole = insight.jacobian_product(lane, 0 if lane.reverse else 4, 5)
        expected = torch.linalg.qr(whole.mT @ start).R.diagonal(dim1=1, dim2=2).abs().log() / 5
        expected = expected.sort(dim=1, descending=True).values
        torch.testing.assert_close(insight.lyapunov_spectrum(lane), expected, rtol=1e-8, atol=1e-8)
