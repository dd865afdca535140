"""The output layer and its loss in one, so that a large vocabulary costs little memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

_LOGITS = 1 << 22  # logits made at a time, 16 MB in float32
_FEWEST_ROWS = 128  # so that a product stays one of matrices
_IGNORED = -100


def linear_cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of −ln softmax(h Wᵀ + b) at the targets, with logits and their gradient made a few rows at a time.

    Equal to `cross_entropy(linear(h, weight, bias), targets)`, which keeps several arrays of (N, V): the logits, their logarithmic
    softmax and its gradient. Here the gradients of h, W and b are made together with the loss, from a piece of the logits that is
    then thrown away, as in Liger Kernel (Hsu et al., 2024). Under torch.autocast, the products are in its dtype, and softmax, loss
    and the sums of gradients in float32.

    Args:
        h: What the output layer reads (N, E).
        weight: W (V, E).
        bias: b (V,).
        targets: Ids (N,), int64; −100 doesn't count.

    Example:
        >>> import torch
        >>> h, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.zeros(5)
        >>> targets = torch.tensor([0, 1, 2, 3, 4, -100])
        >>> plain = torch.nn.functional.cross_entropy(h @ weight.T + bias, targets)
        >>> torch.allclose(linear_cross_entropy(h, weight, bias, targets), plain)
        True
    """
    is_cast = torch.is_autocast_enabled(h.device.type)
    dtype = torch.get_autocast_dtype(h.device.type) if is_cast else weight.dtype
    return _LinearCrossEntropy.apply(h, weight, bias, targets, dtype)


def logits_held(rows: int, vocabulary_size: int) -> int:
    """Return how many logits of (N, V) are held at a time."""
    return min(rows, _rows_at_once(vocabulary_size)) * vocabulary_size


def _rows_at_once(vocabulary_size: int) -> int:
    return max(_LOGITS // vocabulary_size, _FEWEST_ROWS)


class _LinearCrossEntropy(torch.autograd.Function):
    """∂L/∂z = (softmax(z) − onehot(target)) / count, and with z = h Wᵀ + b: ∂h = ∂z W, ∂W = ∂zᵀ h, ∂b = Σ ∂z."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:3])
        with torch.autocast(h.device.type, enabled=False):
            w, b, x = weight.to(dtype), bias.to(dtype), h.to(dtype)
            counts = targets != _IGNORED
            scale = counts.sum().to(bias.dtype).reciprocal()
            total = torch.zeros((), dtype=bias.dtype, device=h.device)
            d_h, d_weight, d_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
            rows = _rows_at_once(len(w))
            for piece in (slice(begin, begin + rows) for begin in range(0, len(x), rows)):
                wanted, counted = targets[piece].where(counts[piece], 0)[:, None], counts[piece, None]
                log_p = linear(x[piece], w, b).to(bias.dtype).log_softmax(1)
                total -= log_p.gather(1, wanted).where(counted, 0).sum()
                if needs_gradient:
                    d_logits = log_p.exp_()  # their gradient times the count, which is put right at the end
                    d_logits.scatter_add_(1, wanted, torch.full_like(counted, -1, dtype=d_logits.dtype))
                    d_logits *= counted
                    d_bias += d_logits.sum(0)
                    d_logits = d_logits.to(dtype)
                    torch.mm(d_logits, w, out=d_h[piece])
                    d_weight += d_logits.T @ x[piece]
        ctx.save_for_backward(d_h.to(h.dtype), d_weight, d_bias, scale)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *gradients, scale = ctx.saved_tensors
        return *(gradient * (scale * d_loss) for gradient in gradients), None, None
