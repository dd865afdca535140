"""What a step does to the state, as a linear map: its Jacobian, products of it, and the rates at which they grow or shrink.

J_t = ∂s_t/∂s_{t−1} over the whole state, (h, c) of an LSTM: with c held fixed, the path on which an LSTM's gradient travels far
would be missing. In a stack of layers the Jacobian of all states together is block-triangular, so the spectrum of the stack is
that of its lanes together. Lanes are those of a `Recording`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from throughtime.errors import InputError
from throughtime.insight.adjoint import Step
from throughtime.insight.recording import Lane
from throughtime.insight.threads import step_threads
from throughtime.shapes import StepState
from throughtime.training.denormals import flush_denormals


@torch.no_grad()
@flush_denormals()
def jacobians(lane: Lane, steps: Sequence[int] | None = None) -> Float[Tensor, "N B S S"]:
    """Return J_t = ∂s_t/∂s_{t−1} for each step asked for.

    Entry [n, b, i, j] is ∂s_t[i]/∂s_{t−1}[j]; zero where a sequence begins at t.

    Args:
        lane: A layer and direction; in reverse the step before t is t + 1.
        steps: Which t; `None` is all.

    Returns:
        (N, B, S, S), S the width of the state: H, or P + H of an LSTM. Cost: S backward steps for each t.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> (lane,) = insight.record(throughtime.LSTM(5, 8), torch.randn(20, 3, 5)).lanes
        >>> insight.jacobians(lane, [10, 11]).shape
        torch.Size([2, 3, 16, 16])
    """
    steps = range(lane.steps) if steps is None else steps
    carrier = Step(lane, sum(lane.widths))
    return torch.stack([_jacobian(carrier, _checked_step(lane, t), 1) for t in steps])


@torch.no_grad()
@flush_denormals()
def jacobian_product(lane: Lane, step: int, lag: int) -> Float[Tensor, "B S S"]:
    """Return ∂s_t/∂s_{t−k} = J_t J_{t−1} ⋯ J_{t−k+1}, the product whose norm vanishes or explodes.

    Args:
        lane: A layer and direction; in reverse it is ∂s_t/∂s_{t+k}.
        step: t.
        lag: k, at least 1.

    Returns:
        (B, S, S). Cost: S·k backward steps.

    Source: Bengio, Simard & Frasconi (1994); Pascanu et al. (1211.5063), eq. 5.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> (lane,) = insight.record(throughtime.GRU(5, 8), torch.randn(20, 3, 5)).lanes
        >>> one, other = insight.jacobians(lane, [11, 10])
        >>> bool(torch.allclose(insight.jacobian_product(lane, 11, 2), one @ other, atol=1e-5))
        True
    """
    _checked_step(lane, step)
    before = lane.steps - step if lane.reverse else step + 1
    if not 1 <= lag <= before:
        raise InputError(f"lag = {lag}: expected 1 to {before}, the steps up to step {step}")
    return _jacobian(Step(lane, sum(lane.widths)), step, lag)


class StepSize(NamedTuple):
    """How strong the Jacobian of each step is, each (N, B).

    Attributes:
        norm: Its largest singular value ‖J_t‖: the most that one step can stretch a gradient.
        radius: Its spectral radius, the largest |eigenvalue|.
        mean: √(mean of the squared singular values), what it does to a gradient of random direction.
    """

    norm: Float[Tensor, "N B"]
    radius: Float[Tensor, "N B"]
    mean: Float[Tensor, "N B"]


def step_size(lane: Lane, steps: Sequence[int] | None = None) -> StepSize:
    """Measure the Jacobian of each step asked for.

    Args:
        lane: A layer and direction.
        steps: Which t; `None` is all.

    Returns:
        Norm, spectral radius and mean gain of each, (N, B). Cost: O(S³) for each step and row.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> (lane,) = insight.record(throughtime.RNN(5, 8), torch.randn(20, 3, 5)).lanes
        >>> size = insight.step_size(lane)
        >>> bool((size.radius <= size.norm * 1.0001).all())
        True
    """
    jacobian = jacobians(lane, steps)
    return StepSize(
        torch.linalg.matrix_norm(jacobian, ord=2),
        torch.linalg.eigvals(jacobian).abs().amax(-1),
        jacobian.square().sum((-2, -1)).div(jacobian.shape[-1]).sqrt(),
    )


@torch.no_grad()
@flush_denormals()
def lyapunov_spectrum(
    lane: Lane, exponents: int | None = None, *, skip: int = 0, leave: int = 0
) -> Float[Tensor, "B M"]:
    """Measure the Lyapunov exponents, the mean growth rates per step of perturbations, in nats.

        Q_{t−1} R_{t−1} = qr(J_tᵀ Q_t),        λ_i = mean over t of ln |R_ii|

    carried in reverse, as backpropagation is: J_tᵀ from the last step to the first. (The same factorisation with J_t runs
    forward; J_tᵀ forward in time would be the Jacobian of nothing.) λ₁ < 0: gradients vanish as e^{λ₁ k}; λ₁ > 0: they
    explode. The exponents describe a long sequence; over a short one they are finite-time exponents, which differ from
    row to row, and a largest one within that spread of zero says neither.

    Args:
        lane: A layer and direction, recorded without resets or lengths; float64 where small exponents matter.
        exponents: M, how many, the largest first; `None` is all.
        skip: Steps where the carrying begins, at the end of the sequence, that let Q align before anything is counted.
        leave: Steps where it ends, at the beginning of the sequence, that aren't counted: there the state still leaves
            its initial value.

    Returns:
        (B, M), one spectrum for each row, in descending order. Cost: T·(M backward steps + a QR of S × M).

    Source: Benettin et al. (1980); for recurrent networks Engelken, Wolf & Abbott (2006.02427) and Vogt et al. (2006.14123).

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> (lane,) = insight.record(throughtime.RNN(5, 8), torch.randn(200, 1, 5)).lanes
        >>> bool((insight.lyapunov_spectrum(lane, 3) < 0).all())  # as torch draws it, a small RNN forgets
        True
    """
    if lane.begins is not None or lane.active is not None:
        raise InputError("exponents are those of one unbroken sequence; record it without reset= and lengths=")
    size = sum(lane.widths)
    count = size if exponents is None else exponents
    if not 1 <= count <= size:
        raise InputError(f"exponents = {count}: expected 1 to {size}, the width of the state")
    if min(skip, leave) < 0 or skip + leave >= lane.steps:
        raise InputError(f"skip = {skip}, leave = {leave}: expected together less than the {lane.steps} recorded steps")
    carrier = Step(lane, count)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(lane.batch, size, count, generator=generator, dtype=torch.float64).to(lane.states[0])
    total = start.new_zeros(lane.batch, count)
    order = range(lane.steps) if lane.reverse else range(lane.steps - 1, -1, -1)
    with step_threads(count * lane.batch * lane.parameters.weight_hh.numel()):
        q = torch.linalg.qr(start).Q
        for done, t in enumerate(order[: lane.steps - leave]):
            stack = _split(q.permute(2, 0, 1), lane.widths)
            carrier.back(stack, t, needs_input=False)
            q, r = torch.linalg.qr(torch.cat(stack, dim=2).permute(1, 2, 0))
            if done >= skip:
                total += r.diagonal(dim1=1, dim2=2).abs().log()
    return (total / (lane.steps - skip - leave)).sort(dim=1, descending=True).values


class SpectralBound(NamedTuple):
    """What the recurrent weights alone allow.

    Attributes:
        sigma_max: The largest singular value of W_hh.
        gamma: The largest slope of the nonlinearity.
        bound: γ σ_max, an upper bound of ‖J_t‖: below 1 gradients must vanish, above 1 they can explode.
        radius: The spectral radius of W_hh.
    """

    sigma_max: float
    gamma: float
    bound: float
    radius: float


def pascanu_bound(lane: Lane) -> SpectralBound:
    """Return γ σ_max(W_hh) of a simple recurrent network: ‖J_t‖ ≤ ‖diag(tanh′)‖ ‖W_hh‖ ≤ γ σ_max.

    γ = 1 for tanh and relu (it would be ¼ for the logistic function). γ σ_max < 1 suffices for vanishing; γ σ_max > 1 is
    necessary, not sufficient, for exploding.

    Args:
        lane: A layer and direction of an RNN.

    Raises:
        InputError: The cell has gates; the bound is for the simple recurrence.

    Source: Pascanu, Mikolov & Bengio (1211.5063), section 2.2.

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> layer = throughtime.init.orthogonal_(throughtime.RNN(5, 8), gain=0.9)
        >>> (lane,) = insight.record(layer, torch.randn(3, 1, 5)).lanes
        >>> round(insight.pascanu_bound(lane).bound, 4)
        0.9
    """
    if lane.cell.spec.base not in ("rnn_tanh", "rnn_relu"):
        raise InputError(f"the bound is for a simple RNN; expected one, not {lane.cell.spec.name!r}: see step_size")
    weight = lane.parameters.weight_hh
    sigma = torch.linalg.matrix_norm(weight, ord=2).item()
    return SpectralBound(sigma, 1.0, sigma, torch.linalg.eigvals(weight).abs().max().item())


def _jacobian(carrier: Step, step: int, lag: int) -> Tensor:
    """Carry the identity back over `lag` steps: row i of the stack is the gradient of s_t[i], so row i of the Jacobian."""
    lane = carrier.lane
    size = sum(lane.widths)
    identity = torch.eye(size, dtype=lane.states[0].dtype, device=lane.states[0].device)
    stack = _split(identity[:, None].expand(size, lane.batch, size), lane.widths)
    with step_threads(size * lane.batch * lane.parameters.weight_hh.numel()):
        for t in range(step, step + lag) if lane.reverse else range(step, step - lag, -1):
            carrier.back(stack, t, needs_input=False)
            if lane.passes_on is not None:
                for part in stack:
                    part.mul_(lane.passes_on[t][:, None])
    return torch.cat(stack, dim=2).transpose(0, 1)


def _split(rows: Tensor, widths: tuple[int, ...]) -> StepState:
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in rows.split(widths, dim=2))


def _checked_step(lane: Lane, step: int) -> int:
    if not 0 <= step < lane.steps:
        raise InputError(f"step {step}: expected one of the recorded steps, 0 to {lane.steps - 1}")
    return step
