"""Clipping does what its definition says and reports what it met."""

import pytest
import torch

from throughtime import InputError
from throughtime.training import Clipping


def with_gradients(*gradients: list[float]) -> list[torch.Tensor]:
    parameters = []
    for gradient in gradients:
        parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        parameters.append(parameter)
    return parameters


def test_the_norm_is_global_and_reported_before_clipping():
    parameters = with_gradients([3.0], [0.0, 4.0])
    report = Clipping(norm=1.0).apply(parameters)
    assert report.norm.item() == 5.0
    assert report.clipped.item()
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor([0.6, 0.0, 0.8]))


def test_a_small_gradient_is_left_alone():
    parameters = with_gradients([0.3], [0.4])
    report = Clipping(norm=1.0, value=1.0).apply(parameters)
    assert not report.clipped
    assert [p.grad.item() for p in parameters] == pytest.approx([0.3, 0.4])


def test_without_need_a_gradient_is_not_even_touched():
    (parameter,) = with_gradients([0.3, 0.4])
    before = parameter.grad._version
    Clipping(norm=0.6).apply([parameter])
    assert parameter.grad._version == before
    Clipping(norm=0.4).apply([parameter])
    assert parameter.grad._version > before


def test_values_are_cut_one_by_one():
    (parameter,) = with_gradients([0.5, -3.0, 2.0])
    report = Clipping(value=1.0).apply([parameter])
    assert report.clipped
    assert parameter.grad.tolist() == [0.5, -1.0, 1.0]


def test_neither_only_measures():
    parameters = with_gradients([30.0], [40.0])
    report = Clipping().apply(parameters)
    assert report.norm.item() == 50.0
    assert not report.clipped
    assert parameters[0].grad.item() == 30.0


def test_a_norm_that_is_no_number_is_reported():
    assert torch.isnan(Clipping(norm=1.0).apply(with_gradients([float("nan")])).norm)


@pytest.mark.parametrize("bounds", [{"norm": -1.0}, {"value": float("inf")}, {"norm": float("nan")}])
def test_bounds_must_be_numbers_above_zero(bounds):
    with pytest.raises(InputError, match="expected a bound above 0, at most 1e30, or 0 for none"):
        Clipping(**bounds)
