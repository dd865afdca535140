"""Carrying many gradients back through time at once: a stack of cotangents, one row for each loss.

The backward pass of a recording is linear in what the losses send into it, so the losses can travel side by side. At step t
each row of the stack is ∂L_s/∂s_t for its own s; one step takes the whole stack from t to t − 1,

    ∂L_s/∂s_{t−1} = J_tᵀ ∂L_s/∂s_t,        J_t = ∂s_t/∂s_{t−1},

with a product with W_hh for the stack instead of one for each loss. In a stack of layers, what a step of the upper layer sends
to its input x_t joins the gradient of the lower layer's h_t.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from throughtime.cells import Parameters
from throughtime.errors import InputError
from throughtime.insight.recording import Lane, Recording
from throughtime.insight.threads import step_threads
from throughtime.kernels import cotangents
from throughtime.shapes import Outputs, StepState
from throughtime.training.denormals import flush_denormals

BLOCK_ELEMENTS = 1 << 25  # numbers that a block of losses may keep at a time: 128 MiB of float32


@dataclass(frozen=True)
class Span:
    """A block of losses and the lags they are followed over.

    Attributes:
        losses: Their steps s, ascending.
        lags: K; a loss is followed over the lags 0 … K − 1.
        two_sided: Whether a loss reaches steps after it too, as below the top of a bidirectional stack.
    """

    losses: list[int]
    lags: int
    two_sided: bool = False

    def rows_at(self, t: int, reverse: bool) -> tuple[int, int]:
        """Return the block's rows a:b whose loss is followed at step t."""
        earliest = t - self.lags + 1 if reverse or self.two_sided else t
        latest = t + self.lags - 1 if not reverse or self.two_sided else t
        return bisect_left(self.losses, earliest), bisect_right(self.losses, latest)

    def times(self, steps: int, reverse: bool) -> range:
        """Return the steps at which any loss is followed, in the order in which a lane meets them going back."""
        first = self.losses[0] - (self.lags - 1 if not reverse or self.two_sided else 0)
        last = self.losses[-1] + (self.lags - 1 if reverse or self.two_sided else 0)
        first, last = max(0, first), min(steps - 1, last)
        return range(first, last + 1) if reverse else range(last, first - 1, -1)

    def window(self, steps: int) -> range:
        """Return the steps, ascending, that any loss reaches in any lane."""
        reached = [*self.times(steps, False), *self.times(steps, True)]
        return range(min(reached), max(reached) + 1)


class Rows(NamedTuple):
    """Where in a sweep an observer is called.

    Attributes:
        t: The step.
        begin: The first row of the block that is followed there.
        end: One past the last.
    """

    t: int
    begin: int
    end: int


Observer = Callable[[Rows, StepState], None]
WeightObserver = Callable[[Rows, Parameters], None]


class Direct:
    """Each loss joins at its own step: what a loss sends into the top layer."""

    def __init__(self, gradients: Outputs, losses: Sequence[int]) -> None:
        self.gradients = gradients
        self.row_of = {s: row for row, s in enumerate(losses)}

    def join(self, h: Tensor, at: Rows) -> None:
        """Add what arrives at step t to the rows of `h`."""
        row = self.row_of.get(at.t)
        if row is not None:
            h[row - at.begin] += self.gradients[at.t]


class FromAbove:
    """Every loss arrives at every step: what the layer above sends to its input, from step `first` on."""

    def __init__(self, gradients: Float[Tensor, "W M B P"], first: int) -> None:
        self.gradients = gradients
        self.first = first

    def join(self, h: Tensor, at: Rows) -> None:
        """Add what arrives at step t to the rows of `h`."""
        h += self.gradients[at.t - self.first, at.begin : at.end]


class Step:
    """One lane's step, backward, for a stack of cotangents (rows, B, ·).

    Uses the step's linear factors where the cell has them, else `step_backward` itself on rows · B rows.
    `through_weights=False` leaves out what goes through W_hh.
    """

    def __init__(self, lane: Lane, rows: int, through_weights: bool = True) -> None:
        self.through_weights = through_weights
        self.factors = lane.linearised
        if self.factors is None and not through_weights:
            weights = lane.parameters._replace(weight_hh=torch.zeros_like(lane.parameters.weight_hh))
            lane = replace(lane, parameters=weights)
        self.lane = lane
        if self.factors is not None:
            gates = self.factors.recurrent[0]
            self.buffer = gates.new_empty((rows, *gates.shape[1:]))

    def back(self, stack: StepState, t: int, needs_input: bool) -> Tensor | None:
        """Carry `stack` from t to the step before, in place; return the gradients of x_t (rows, B, I) if needed."""
        if self.factors is None:
            return self._back_by_equations(stack, t, needs_input)
        weight_ih, weight_hh, *_ = self.lane.parameters
        grad_x = None
        if needs_input:
            grad_a = self._gates(stack, self.factors.inputs or self.factors.recurrent, t)
            grad_x = (grad_a @ weight_ih).unflatten(0, stack[0].shape[:2])
        grad_a = self._gates(stack, self.factors.recurrent, t) if self.through_weights else None
        h, *rest = stack
        (h_to_h, *h_to_rest), *from_rest = self.factors.direct
        for j, (part, from_h) in enumerate(zip(rest, h_to_rest, strict=True), start=1):
            from_itself = from_rest[j - 1][j]
            assert from_itself is not None
            assert from_h is not None
            part.mul_(from_itself[t]).addcmul_(h, from_h[t])
        if h_to_h is None:
            h.zero_()
        else:
            h.mul_(h_to_h[t])
        if grad_a is not None:
            h.flatten(0, 1).addmm_(grad_a, weight_hh)
        return grad_x

    def _gates(self, stack: StepState, factors: tuple[Tensor, ...], t: int) -> Tensor:
        """Return ∂a of the whole stack, (rows · B, G · H); the next call overwrites it."""
        grad_a = self.buffer[: stack[0].shape[0]]
        torch.mul(stack[0].unsqueeze(2), factors[0][t], out=grad_a)
        for part, factor in zip(stack[1:], factors[1:], strict=True):
            grad_a.addcmul_(part.unsqueeze(2), factor[t])
        return grad_a.flatten(0, 1).flatten(1)

    def _back_by_equations(self, stack: StepState, t: int, needs_input: bool) -> Tensor | None:
        rows, batch = stack[0].shape[:2]
        saved = self.lane.cell.saved(
            *(f.expand(rows, *f.shape).reshape(rows * batch, *f.shape[1:]) for f in self.lane.saved[t])
        )
        gradient = self.lane.cell.step_backward(tuple(s.flatten(0, 1) for s in stack), saved, self.lane.parameters)
        for part, before in zip(stack, gradient.state, strict=True):
            part.copy_(before.unflatten(0, (rows, batch)))
        return gradient.x.unflatten(0, (rows, batch)) if needs_input else None


def norm(*parts: Tensor) -> Float[Tensor, "R B"]:
    """Return the norm over the last axis, of parts together, in float64, which holds the squares of all that float32 holds."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return torch.linalg.vector_norm(whole, dim=2, dtype=torch.float64)


def sweep(
    lane: Lane,
    source: Direct | FromAbove,
    span: Span,
    observe: Observer | None,
    observe_weights: WeightObserver | None = None,
    observe_inputs: Observer | None = None,
) -> None:
    """Carry a block of losses back through one lane.

    Args:
        lane: The layer and direction.
        source: What the losses send into its h.
        span: The losses, and how far to follow them.
        observe: Called at each step with the rows' ∂L_s/∂s_t, each (rows, B, ·); it must not keep or change them.
        observe_weights: Called with the rows' gradient of the weights at step t, each tensor with a leading axis of rows.
        observe_inputs: Called with the rows' ∂L_s/∂x_t, (rows, B, I), as a tuple of one.
    """
    size = len(span.losses)
    stacks = tuple(s.new_zeros(size, *s.shape[1:]) for s in lane.states)
    step = Step(lane, size)

    def back(t: int, begin: int, end: int) -> None:
        at = Rows(t, begin, end)
        stack = tuple(s[begin:end] for s in stacks)
        source.join(stack[0], at)
        if observe is not None:
            observe(at, stack)
        if observe_weights is not None:
            observe_weights(at, _weight_gradients(lane, stack, t))
        grad_x = step.back(stack, t, observe_inputs is not None)
        if grad_x is not None and observe_inputs is not None:
            observe_inputs(at, (grad_x,))
        if lane.passes_on is not None:
            for part in stack:
                part.mul_(lane.passes_on[t][:, None])

    with step_threads(size * lane.batch * lane.parameters.weight_hh.numel()):
        for t in span.times(lane.steps, lane.reverse):
            begin, end = span.rows_at(t, lane.reverse)
            if begin < end:
                back(t, begin, end)


def native_norms(
    recording: Recording, grad_outputs: Outputs, losses: Sequence[int], lags: int
) -> list[Float[Tensor, "S K B"]] | None:
    """Return what sweeping every lane for the norms of its stack comes to, by loss and lag, from the native kernel.

    `None` where that doesn't serve: in deep stacks, with resets, in reverse with lengths, in cells without linear factors.
    """
    lanes = recording.lanes
    if len(recording.layers) > 1 or not all(
        cotangents.serves(lane.parameters.weight_hh) and lane.passes_on is None and lane.linearised is not None
        for lane in lanes
    ):
        return None
    found = []
    for lane, gradients in zip(lanes, _masked(grad_outputs, recording).chunk(len(lanes), dim=2), strict=True):
        factors = lane.linearised
        assert factors is not None
        weight_hh = lane.parameters.weight_hh
        found.append(
            cotangents.norms(weight_hh, factors.recurrent, factors.direct, gradients, losses, lags, lane.reverse)
        )
    return found


def _weight_gradients(lane: Lane, stack: StepState, t: int) -> Parameters:
    """Return each row's ∂L_s/∂W at step t, summed over the batch: tensors with a leading axis of rows."""

    def one_row(*grad_state: Tensor) -> tuple[Tensor, ...]:
        return tuple(lane.cell.step_backward(grad_state, lane.saved[t], lane.parameters).parameters.to_list())

    return Parameters.from_list(list(torch.func.vmap(one_row)(*stack)), lane.cell.spec.variant_parameters)


class Watch(NamedTuple):
    """What to observe in one lane."""

    states: Observer | None = None
    weights: WeightObserver | None = None
    inputs: Observer | None = None


@flush_denormals()
def carry(
    recording: Recording,
    grad_outputs: Outputs,
    losses: Sequence[int],
    lags: int,
    watch: Callable[[Lane, Span], Watch],
    per_row: int = 0,
) -> None:
    """Carry every loss back through every lane, in blocks of losses that fit in memory.

    Args:
        recording: The forward pass.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).
        losses: The steps s to follow, ascending.
        lags: K.
        watch: Called for each lane and block; says what to observe there.
        per_row: Numbers that the observers keep for each loss and step, to size the blocks by.
    """
    deep = len(recording.layers) > 1
    steps, batch, width = recording.outputs.shape
    lags = (
        steps if deep and recording.bidirectional else min(lags, steps)
    )  # there, a path may leave a window and return
    kept = per_row + (batch * width if deep else 0)
    gradients = _masked(grad_outputs, recording)
    for block in _blocks(list(losses), lags, steps, kept):
        top = Span(block, lags)
        source: list[Direct | FromAbove] = [
            Direct(part, block) for part in gradients.chunk(2 if recording.bidirectional else 1, dim=2)
        ]
        for depth in range(len(recording.layers) - 1, -1, -1):
            two_sided = recording.bidirectional and depth < len(recording.layers) - 1
            span = Span(block, lags, two_sided) if two_sided else top
            source = _carry_layer(recording.layers[depth], source, span, watch, is_bottom=depth == 0)


def _carry_layer(
    lanes: tuple[Lane, ...],
    sources: list[Direct | FromAbove],
    span: Span,
    watch: Callable[[Lane, Span], Watch],
    is_bottom: bool,
) -> list[Direct | FromAbove]:
    """Carry a block through one layer; return what arrives at the layer below, for each of its directions."""
    below, window = None, span.window(lanes[0].steps)
    if not is_bottom:
        width = lanes[0].parameters.weight_ih.shape[1]
        below = lanes[0].states[0].new_zeros(len(window), len(span.losses), lanes[0].batch, width)
    for lane, source in zip(lanes, sources, strict=True):
        wanted = watch(lane, span)
        inputs = wanted.inputs if below is None else _collector(below, window[0])
        sweep(lane, source, span, wanted.states, wanted.weights, inputs)
    return [] if below is None else [FromAbove(part, window[0]) for part in below.chunk(len(lanes), dim=3)]


def _collector(below: Tensor, first: int) -> Observer:
    def collect(at: Rows, gradient: StepState) -> None:
        below[at.t - first, at.begin : at.end] += gradient[0]

    return collect


def _masked(grad_outputs: Outputs, recording: Recording) -> Outputs:
    """Return the losses' gradients with the padding at zero: what stands there is no loss."""
    if grad_outputs.shape != recording.outputs.shape:
        raise InputError(
            f"grad_outputs has shape {list(grad_outputs.shape)}; expected that of the recorded outputs, "
            f"{list(recording.outputs.shape)}"
        )
    gradients = grad_outputs.detach().to(recording.outputs.dtype)
    active = recording.lanes[0].active
    return gradients if active is None else torch.where(active[:, :, None], gradients, 0)


def _blocks(losses: list[int], lags: int, steps: int, kept: int) -> list[list[int]]:
    """Cut the losses into blocks whose kept numbers, `kept` for each loss and step it reaches, fit in BLOCK_ELEMENTS."""
    size = len(losses)
    while size > 1 and size * min(steps, size + lags) * kept > BLOCK_ELEMENTS:
        size = (size + 1) // 2
    return [losses[i : i + size] for i in range(0, len(losses), size)]


@torch.no_grad()
@flush_denormals()
def total_adjoint(recording: Recording, grad_outputs: Outputs) -> list[StepState]:
    """Return δ_t = ∂(Σ_s L_s)/∂s_t, the gradient that backpropagation through time holds at each step.

    It counts the step's own loss and all later ones, and the whole state: (h, c) of an LSTM, whose c is what carries far.

    Args:
        recording: The forward pass.
        grad_outputs: ∂L_s/∂output_s, (T, B, directions · P).

    Returns:
        For each lane, a tensor (T, B, ·) for each part of the state. Cost: one backward pass, O(T·B·G·H²).

    Source: Rumelhart, Hinton & Williams (1986); Werbos (1990).

    Example:
        >>> import torch, throughtime
        >>> from throughtime import insight
        >>> recording = insight.record(throughtime.LSTM(5, 8), torch.randn(20, 3, 5))
        >>> (adjoint,) = insight.total_adjoint(recording, torch.ones(20, 3, 8))
        >>> [part.shape for part in adjoint]
        [torch.Size([20, 3, 8]), torch.Size([20, 3, 8])]
    """
    totals = {id(lane): tuple(torch.zeros_like(s) for s in lane.states) for lane in recording.lanes}
    steps = recording.lanes[0].steps
    span = Span([0], steps, two_sided=True)  # all losses in one row, which reaches everywhere
    arriving = _masked(grad_outputs, recording)[:, None]
    sources: list[Direct | FromAbove] = [
        FromAbove(part, 0) for part in arriving.chunk(2 if recording.bidirectional else 1, dim=3)
    ]

    def watch(lane: Lane, _: Span) -> Watch:
        def keep(at: Rows, stack: StepState) -> None:
            for total, part in zip(totals[id(lane)], stack, strict=True):
                total[at.t] = part[0]

        return Watch(states=keep)

    for depth in range(len(recording.layers) - 1, -1, -1):
        sources = _carry_layer(recording.layers[depth], sources, span, watch, is_bottom=depth == 0)
    return [totals[id(lane)] for lane in recording.lanes]
