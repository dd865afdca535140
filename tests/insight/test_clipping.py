import math

import pytest
import torch

import throughtime
from throughtime import insight
from throughtime.cells import Parameters
from throughtime.errors import InputError
from throughtime.training.clipping import Clipping


def test_statistics_of_clipping():
    norms = torch.tensor([0.2, 2.0, 4.0, 0.4, math.inf])
    assert insight.clip_statistics(norms, 1.0) == pytest.approx((1.2, 4.0, 0.6, 0.375, 1))  # half-way between 0.4 and 2
    assert insight.clip_statistics(torch.tensor([0.5]), 1.0) == pytest.approx((0.5, 0.5, 0.0, 1.0, 0))
    assert math.isnan(insight.clip_statistics(torch.tensor([math.nan]), 1.0).median)
    with pytest.raises(InputError, match="at least one norm"):
        insight.clip_statistics(torch.empty(0), 1.0)


def by_lag(*rows):
    """The lag-resolved gradient of a network of one weight_ih and one weight_hh, both 1 × 1."""
    columns = torch.tensor(rows, dtype=torch.float64)
    return [Parameters(columns[:, 0].reshape(-1, 1, 1), columns[:, 1].reshape(-1, 1, 1))]


def test_shares_of_the_lags():
    shares = insight.lag_shares(by_lag([3.0, 0.0], [0.0, 4.0]))
    torch.testing.assert_close(shares, torch.tensor([9.0, 16.0], dtype=torch.float64) / 25)


def test_what_clipping_takes_from_which_lags():
    near, far = by_lag([1.0, 0.0], [0.0, 0.0]), by_lag([0.0, 0.0], [0.0, 4.0])
    found = insight.clipped_lags([near, far], max_norm=1.0)
    assert found.share == 0.5  # only the far one is above 1
    torch.testing.assert_close(found.removed, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found.kept, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert insight.clipped_lags([near], 5.0).removed.isnan().all()
    with pytest.raises(InputError, match="expected at least one"):
        insight.clipped_lags([], 1.0)


def test_value_clipping_bends_and_norm_clipping_does_not():
    layer = throughtime.GRU(3, 4)
    layer(torch.randn(9, 2, 3))[0].sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    clipping = Clipping(value=0.05)
    cosine = insight.value_clip_cosine(grads, 0.05)
    clipping.apply(layer.parameters())
    a, b = (torch.cat([g.flatten() for g in part]).double() for part in (grads, [p.grad for p in layer.parameters()]))
    assert cosine == pytest.approx(torch.dot(a, b).item() / (a.norm() * b.norm()).item(), abs=1e-6)
    assert cosine < 0.99
    assert insight.value_clip_cosine(grads, 1e9) == pytest.approx(1)
    with pytest.raises(InputError, match="max_value"):
        insight.value_clip_cosine(grads, 0)
