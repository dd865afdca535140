"""The comparison helper must refuse wrong answers."""

import pytest
import torch
from comparison import (
    InOrder,
    assert_as_accurate,
    assert_as_accurate_on_average,
    gradients,
    least_accurate,
    moved,
)


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(50, dtype=torch.float64)


def test_accepts_honest_rounding(exact):
    assert_as_accurate([exact.float()], [exact.float()], [exact], 2.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * (1 + 1e-5),
        lambda x: x.roll(1),
        lambda x: torch.where(torch.arange(50) == 7, torch.nan, x),
        lambda x: x[:49],
        lambda x: x.double(),
        lambda x: x + 2e-6,
    ],
    ids=["scaled", "permuted", "nan", "short", "other dtype", "shifted"],
)
def test_refuses_wrong_answers(exact, spoil):
    with pytest.raises(AssertionError):
        assert_as_accurate([spoil(exact.float())], [exact.float()], [exact], 2.0)


def draws_that_err(exact, *times: float):
    return [([(exact + t * 1e-5).float()], [(exact + 1e-5).float()], [exact]) for t in times]


def test_on_average_a_draw_may_err_more_by_chance(exact):
    assert_as_accurate_on_average(draws_that_err(exact, 0.5, 1.0, 4.5, 0.8, 1.1), 2.0, ["h"])


@pytest.mark.parametrize("times", [(2.2, 2.2, 2.2, 2.2, 2.2), (0.1, 0.1, 0.1, 0.1, 40.0), (1.0, float("nan"))])
def test_on_average_refuses_what_errs_always_or_once_by_far(exact, times):
    with pytest.raises(AssertionError, match="h: "):
        assert_as_accurate_on_average(draws_that_err(exact, *times), 2.0, ["h"])


def test_refuses_a_missing_result(exact):
    with pytest.raises(AssertionError):
        assert_as_accurate([], [exact.float()], [exact], 2.0)


def test_gradients_are_those_of_the_combination():
    a = torch.randn(4)
    (grad,) = gradients(lambda x: [3 * x], [a])
    assert torch.allclose(
        grad, 3 * torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    )


def test_the_least_accurate_of_each_result_is_taken(exact):
    near, far = (exact + 1e-6).float(), (exact + 1e-5).float()
    assert all(map(torch.equal, least_accurate([exact, exact], [near, far], [far, near]), [far, far]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moved_numbers_are_neighbours(exact, dtype):
    (other,) = moved([exact.to(dtype)], dtype)
    distance = (other - exact.to(dtype)).abs() / exact.to(dtype).abs()
    assert 0 < distance.max() <= torch.finfo(dtype).eps  # half of it, rounded itself
    assert torch.equal(other, *moved([exact.to(dtype)], dtype))


def test_in_order_means_term_by_term():
    left, right, start = torch.randn(3, 700), torch.randn(700, 5), torch.randn(5)
    sums, rows, started = torch.zeros(3, 5), torch.zeros(5), start.expand(3, 5)
    for k in range(700):
        sums, started = sums + left[:, k, None] * right[k], started + left[:, k, None] * right[k]
        rows = rows + right[k]
    with InOrder():
        assert torch.equal(left @ right, sums)
        assert torch.equal(torch.nn.functional.linear(left, right.T, start), started)
        assert torch.equal(right.sum(0), rows)
        assert torch.equal(right.sum(0, keepdim=True), rows[None])
        assert torch.equal(left.double() @ right.double(), (left.double() @ right.double()))
