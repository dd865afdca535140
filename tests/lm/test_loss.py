"""The chunked loss against torch's, its gradients, and what it holds in memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import throughtime.lm.loss as loss
from throughtime.lm import LanguageModel, ModelConfig
from throughtime.lm.loss import linear_cross_entropy


def make(dtype=torch.float64, n=23, e=5, v=11):
    generator = torch.Generator().manual_seed(4)
    shapes = (n, e), (v, e), (v,)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[[0, 7, n - 1]] = -100
    return *tensors, targets


def plain(h, weight, bias, targets):
    return cross_entropy(linear(h, weight, bias), targets)


@pytest.mark.parametrize("rows", [1, 4, 23, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_pieces_equal_the_whole(monkeypatch, rows, dtype, tolerance):
    monkeypatch.setattr(loss, "_LOGITS", 11 * rows)
    monkeypatch.setattr(loss, "_FEWEST_ROWS", 1)
    *tensors, targets = make(dtype)
    expected, actual = plain(*tensors, targets), linear_cross_entropy(*tensors, targets)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(2 * expected, tensors)
    for gradient, correct in zip(torch.autograd.grad(2 * actual, tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=tolerance, atol=tolerance)


def test_only_what_needs_a_gradient_gets_one():
    h, weight, bias, targets = make()
    loss = linear_cross_entropy(h, weight.detach(), bias.detach(), targets)
    torch.testing.assert_close(torch.autograd.grad(loss, h), torch.autograd.grad(plain(h, weight, bias, targets), h))
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, bias, targets).requires_grad


def test_large_logits_stay_finite():
    h, weight, bias, targets = make(torch.float32)
    loss = linear_cross_entropy(1e4 * h, weight, bias, targets)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, plain(1e4 * h, weight, bias, targets))


def test_it_computes_in_the_dtype_of_autocast():
    """Products round to bfloat16; a sum of gradients over pieces doesn't."""
    h, weight, bias, targets = make(torch.float32, n=400, e=32)
    expected = plain(h, weight, bias, targets)
    wanted = torch.autograd.grad(expected, (h, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_cross_entropy(h, weight, bias, targets)
    assert actual.dtype == torch.float32
    assert 0 < abs(actual - expected) < 0.01 * expected
    for gradient, correct in zip(torch.autograd.grad(actual, (h, weight, bias)), wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - correct).norm() < 0.01 * correct.norm()


def test_a_second_derivative_is_refused():
    h, weight, bias, targets = make()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(h, weight, bias, targets), h, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_logits_are_held_a_piece_at_a_time():
    assert loss.logits_held(rows=100, vocabulary_size=65) == 6500
    assert loss.logits_held(rows=2000, vocabulary_size=10_000) < 0.25 * 2000 * 10_000
    assert loss.logits_held(rows=2000, vocabulary_size=1_000_000) == 128_000_000


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_loss_is_that_of_its_logits(tied):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(17, hidden_size=8, embedding_size=6, tied=tied))
    ids, targets = torch.randint(0, 17, (2, 5, 3))
    targets[4, 1] = -100
    logits, _ = model(ids)
    expected = torch.autograd.grad(cross_entropy(logits.flatten(0, 1), targets.flatten()), list(model.parameters()))
    h, _ = model.hidden(ids)
    actual = torch.autograd.grad(model.loss(h, targets), list(model.parameters()))
    torch.testing.assert_close(actual, expected)
