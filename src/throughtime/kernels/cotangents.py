"""The native kernel of the lag matrix: many losses carried back through one layer at once (`csrc/cotangents.cpp`).

A step is given by its linear factors (`throughtime.cells.Linearised`), so this serves the cells that have them. Its plain twin is
`throughtime.insight.adjoint.sweep`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from throughtime.kernels import native

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}


def serves(weight_hh: Tensor) -> bool:
    """Return whether the kernel is there for a layer whose weights are like this."""
    return native.module is not None and weight_hh.device.type == "cpu" and weight_hh.dtype in _SUFFIX


def norms(
    weight_hh: Tensor,
    to_gates: Sequence[Tensor],
    direct: Sequence[Sequence[Tensor | None]],
    grad_output: Tensor,
    losses: Sequence[int],
    lags: int,
    reverse: bool,
) -> Tensor:
    """Return ‖∂L_s/∂s_t‖ over the whole state, by loss and lag.

    Args:
        weight_hh: W_hh, (G·H, H).
        to_gates: For each part of the state, what becomes of its gradient on the way to the gates, (T, B, G, H).
        direct: For each part of the state, what of its gradient goes straight to each part before, (T, B, H) or `None`: of h
            to h and c, of c to c.
        grad_output: What each step's loss sends into h, (T, B, H).
        losses: Their steps, ascending.
        lags: K.
        reverse: Whether the layer runs from the last step to the first.

    Returns:
        (S, K, B), zero where there is no such step.

    Raises:
        ValueError: A shape, dtype or step doesn't fit.
    """
    steps, batch, hidden = grad_output.shape
    gates = weight_hh.shape[0] // hidden
    has_c = len(to_gates) == 2
    factors = [
        *to_gates,
        *([] if has_c else [None]),
        direct[0][0],
        *((direct[0][1], direct[1][1]) if has_c else (None, None)),
    ]
    wide, narrow = (steps, batch, gates, hidden), (steps, batch, hidden)
    for factor, shape in zip(
        (*factors, weight_hh), (wide, wide, narrow, narrow, narrow, (gates * hidden, hidden)), strict=True
    ):
        if factor is not None and (factor.shape != shape or factor.dtype != grad_output.dtype):
            raise ValueError(
                f"a factor is {factor.dtype} {list(factor.shape)}; expected {grad_output.dtype} {list(shape)}"
            )
    if has_c and (factors[3] is None or factors[4] is None):
        raise ValueError("h or c sends nothing to c; expected both factors with a cell that has c")
    if not serves(weight_hh) or lags < 1 or list(losses) != sorted(s for s in losses if 0 <= s < steps):
        raise ValueError(
            f"losses at {list(losses)}, lags {lags}; expected ascending steps below {steps}, a lag, and a kernel"
        )
    suffix = _SUFFIX[grad_output.dtype]
    weight_hh, grad_output = weight_hh.contiguous(), grad_output.contiguous()
    factors = [None if factor is None else factor.contiguous() for factor in factors]
    at, out = torch.tensor(losses), grad_output.new_zeros(len(losses), lags, batch)
    getattr(native.module, f"cotangent_norms_{suffix}")(
        *(torch.get_num_threads(), reverse, steps, batch, hidden, gates, len(losses), lags, at.data_ptr()),
        *(0 if factor is None else factor.data_ptr() for factor in factors),
        *(weight_hh.data_ptr(), grad_output.data_ptr(), out.data_ptr()),
    )
    return out
