"""The native CPU kernels: one layer in one direction, or in both at once, forward and backward through time.

The equations stand in `throughtime.cells`; the time loop is C++ (`csrc/`), chosen for the machine's instruction set when
it is loaded. Work is divided so that the time loop does only what must be sequential: x W_ihᵀ for all steps is one
product before it, and the weights' gradients are one product after it. Both go in stretches of steps, so that
what one writes is still in the cache when the other reads it, and the backward pass needs little memory of its own.

Rows are sorted by length inside, and only real steps have a place in the arrays (torch's PackedSequence order):
time and memory are proportional to the sum of the lengths. Input and output may come and go in that order: packed.

Both directions of a layer are two calls of the time loop, each on its stretch of steps, whose threads never meet; each writes
its half of the output's columns.

In bfloat16 products multiply bfloat16 and sum float32; state, biases, pointwise arithmetic and the sums of the weights'
gradients are float32. Output and what is kept are bfloat16, parameters and their gradients bfloat16 or float32.

Kept for the backward pass, in elements per real step, besides input and output: LSTM 5 H, GRU 4 H, GRU with the reset
gate before the product 3 H, RNN none. With `recompute_every` only the state, at the steps where a segment begins: the backward
pass computes the rest again, a segment at a time. Segments are whole stretches, so that every sum is taken in the same order
and gradients are the same to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.arguments import check_token_ids
from throughtime.kernels.native import address, addresses, kind, new, new_zeros, plain
from throughtime.kernels.request import (
    Call,
    Stretch,
    as_weight,
    both_directions,
    check_memory,
    check_saved,
    count_segments,
    gate_count,
    joined,
    new_input_sum,
    shares,
    table_of,
)


def saved_widths(cell: str, hidden: int) -> list[int]:
    """Return the widths of what `forward` keeps; each has a row for every real step of every sequence."""
    if cell.startswith("rnn"):
        return []
    return [gate_count(cell) * hidden, *([hidden] if cell in ("lstm", "gru") else [])]


def segment_count(cell: str, steps: int, batch: int, hidden: int, dtype: torch.dtype, every: int) -> int:
    """Return how many states `forward` keeps with `recompute_every`; sizes may be symbolic."""
    return count_segments(steps, batch, _gradient_width(cell, hidden), dtype, every)


class Gradient(NamedTuple):
    """Gradients for the input (or `None`), the initial state and the parameters."""

    input: Tensor | None
    initial: list[Tensor]
    parameters: list[Tensor]


def forward(
    cell: str,
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    keep: bool = True,
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
    bidirectional: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run one layer in one direction, or in both.

    Args:
        cell: Key of `throughtime.cells.CELLS`.
        input: (T, B, I), float32, float64 or bfloat16; or token ids (T, B), int64, which choose columns of `weight_ih`.
            Those past a row's end don't matter.
        initial: [h_0] or [h_0, c_0], each (B, ·), of the input's dtype.
        parameters: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr], as torch has them, of the input's dtype;
            float32 beside bfloat16 input too, and then so are their gradients.
        lengths: Real steps of each row (B,), int64, in any order, 0 to T; `None` means T.
        reset: Where a new sequence begins (T, B), bool.
        reverse: Run from the last step to the first.
        keep: Whether a backward pass will follow.
        batch_sizes: Of packed input, how many rows take part in each step (T,), int64, as in torch's PackedSequence. Then input
            is (N, I) or ids (N,), N the sum over them, the rows of the state are sorted in the same order, and there are
            neither `lengths` nor `reset`.
        recompute_every: Keep only the state, in every so many steps, rounded up to whole stretches; `backward` computes the
            rest again. 0 keeps it all.
        bidirectional: Run both ways at once. Then `initial`, `parameters` and what is returned hold the forward pass's tensors
            and, after them, as many of the reverse one's; the output is (T, B, 2 P), and `reverse` false.

    Returns:
        The output (T, B, P), zero past a row's end, or packed (N, P); the final state; and what `backward` needs (empty unless
        `keep`).
    """
    plan = Plan(cell, input, initial, parameters, lengths, reset, reverse, batch_sizes, bidirectional)
    return plan.forward(input, keep, recompute_every)


def backward(
    cell: str,
    grad_output: Tensor | None,
    grad_final: list[Tensor],
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    needs_input: bool = True,
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
    bidirectional: bool = False,
) -> Gradient:
    """Backpropagate through time.

    Args:
        cell: As in `forward`.
        grad_output: ∂L/∂output (T, B, P), or `None` for zero; its values past a row's end don't matter.
        grad_final: Gradient of the final state, shaped like it.
        input: As in `forward`.
        initial: As in `forward`.
        parameters: As in `forward`.
        output: What `forward` returned.
        saved: What `forward` returned; it isn't changed.
        lengths: As in `forward`.
        reset: As in `forward`.
        reverse: As in `forward`.
        needs_input: Whether the input's gradient is wanted; token ids have none.
        batch_sizes: As in `forward`.
        recompute_every: As in `forward`.
        bidirectional: As in `forward`.
    """
    plan = Plan(cell, input, initial, parameters, lengths, reset, reverse, batch_sizes, bidirectional)
    return plan.backward(grad_output, grad_final, input, output, saved, needs_input, recompute_every)


class Plan:
    """A request, checked and laid out once for both passes."""

    def __init__(
        self,
        cell: str,
        input: Tensor,
        initial: list[Tensor],
        parameters: list[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
        batch_sizes: Tensor | None,
        bidirectional: bool,
    ) -> None:
        """Check and lay out; the arguments are those of `forward`."""
        given = (cell, input, initial, parameters, lengths, reset, reverse, batch_sizes)
        self._cell = cell
        self._calls = both_directions(*given) if bidirectional else [Call(*given)]
        self._threads = torch.get_num_threads()
        self._marks: list[Any] = []

    def let_go(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> None:
        """Drop input, state and parameters, so that it keeps none of them alive, until `take_up`."""
        self._marks = _marks(input, initial, parameters)
        for call in self._calls:
            call.let_go()

    def take_up(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> "Plan | None":
        """Return the same plan for these tensors, or `None` if they aren't in the same memory, or threads are more or fewer."""
        if self._threads != torch.get_num_threads() or self._marks != _marks(input, initial, parameters):
            return None
        plan, count = object.__new__(Plan), len(self._calls)
        plan.__dict__ |= self.__dict__
        each = zip(self._calls, shares(initial, count), shares(parameters, count), strict=True)
        plan._calls = [call.take_up(input, *own) for call, *own in each]
        return plan

    def forward(self, input: Tensor, keep: bool, recompute_every: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run forward, as `forward` does."""
        calls, call = self._calls, self._calls[0]
        x, output = call.rows.compact(input), call.new_output()
        loops = [
            _ForwardLoop(self._cell, each, x, part)
            for each, part in zip(calls, _columns(output, len(calls)), strict=True)
        ]
        states = [[s.to(call.arithmetic, copy=True) for s in each.initial] for each in calls]
        if keep and recompute_every and saved_widths(self._cell, 1):
            segments = call.segments(_gradient_width(self._cell, call.weights.hidden), recompute_every)
            saved = run_segments(calls, segments, states, lambda parts: _run_forward(loops, parts, states))
        else:
            saved = [loop.new_saved(call.rows.count) if keep else [] for loop in loops]
            stretches = call.stretches(call.weights.gates * call.weights.hidden)
            _run_forward(loops, [stretches] * len(loops), states, saved)
        final = joined(states)
        if call.dtype != call.arithmetic:
            final = [s.to(call.dtype) for s in final]
        return output, final, joined(saved)

    def backward(
        self,
        grad_output: Tensor | None,
        grad_final: Sequence[Tensor | None],
        input: Tensor,
        output: Tensor,
        saved: list[Tensor],
        needs_input: bool,
        recompute_every: int,
    ) -> Gradient:
        """Backpropagate, as `backward` does; a final state's gradient may be `None` for zero."""
        calls, call, count = self._calls, self._calls[0], len(self._calls)
        widths = saved_widths(self._cell, call.weights.hidden)
        recompute_every = recompute_every if widths else 0
        segments = call.segments(_gradient_width(self._cell, call.weights.hidden), recompute_every)
        check_saved(calls, input, grad_output, grad_final, output, saved, widths, segments if recompute_every else None)
        output, saved = plain(output), [plain(tensor) for tensor in saved]
        check_memory(output=[output], grad_output=[grad_output], grad_final=grad_final, saved=saved)
        x, kept = call.rows.compact(input), shares(saved, count)
        if call.reads_ids:  # they may have been written to since `forward`, where autograd doesn't see it
            check_token_ids(x, call.weights.weight_ih.shape[1])
        outputs = _columns(output, count)
        grads = [None] * count if grad_output is None else _columns(plain(grad_output), count)
        needs_input = needs_input and not call.reads_ids
        loops = [
            _BackwardLoop(self._cell, each, out, grad, final, x, needs_input)
            for each, out, grad, final in zip(calls, outputs, grads, shares(grad_final, count), strict=True)
        ]
        again = [_ForwardLoop(self._cell, each, x, None) for each in calls] if recompute_every else []
        for parts in zip(*(each.backward_order(segments) for each in calls), strict=True):
            here, first_rows = [segment for _, segment in parts], [0] * count
            if again:
                before = [[s[number] for s in states] for (number, _), states in zip(parts, kept, strict=True)]
                saved_here, first_rows = _recompute(again, here, before), [segment[0].first_row for segment in here]
            else:
                saved_here = kept
            each = zip(loops, here, saved_here, first_rows, strict=True)
            passes = [loop.native_pass(own, kept_here, first) for loop, own, kept_here, first in each]
            kind(call.dtype).backward(*passes)
        grad_initial = joined([loop.grad_initial() for loop in loops])
        if call.dtype != call.arithmetic:
            grad_initial = [g.to(call.dtype) for g in grad_initial]
        grad_parameters = joined([loop.sums.to_list(call.weights_dtype) for loop in loops])
        return Gradient(_sum_over_directions(call, loops, input.shape), grad_initial, grad_parameters)


def _marks(input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> list[Any]:
    """What tells whether tensors are the same and in the same memory."""
    return [(t.data_ptr(), t.shape, t.dtype) for t in (input, *initial, *parameters)]


def run_segments(
    calls: list[Call],
    segments: list[list[Stretch]],
    states: list[list[Tensor]],
    run: Callable[[list[list[Stretch]]], None],
) -> list[list[Tensor]]:
    """Run forward loops segment by segment; return the states of each before each of its segments, (segments, B, ·)."""
    kept = [[s.new_empty((len(segments), *s.shape)) for s in state] for state in states]
    for parts in zip(*(call.forward_order(segments) for call in calls), strict=True):
        for (number, _), state, before in zip(parts, states, kept, strict=True):
            for s, all_before in zip(state, before, strict=True):
                all_before[number] = s
        run([segment for _, segment in parts])
    return kept


def _run_forward(
    loops: list["_ForwardLoop"],
    stretches: list[list[Stretch]],
    states: list[list[Tensor]],
    saved: Sequence[Sequence[Tensor]] = ((), ()),
    first_rows: Sequence[int] = (0, 0),
) -> None:
    """Run forward loops at once, each over its stretches."""
    each = zip(loops, stretches, states, saved, first_rows, strict=False)
    passes = [loop.native_pass(own, state, kept, first) for loop, own, state, kept, first in each]
    kind(loops[0].call.dtype).forward(*passes)


def _recompute(
    loops: list["_ForwardLoop"], segments: list[list[Stretch]], before: list[list[Tensor]]
) -> list[list[Tensor]]:
    """Compute what the backward passes need of their segments, from the states before them."""
    saved = []
    for loop, segment, state in zip(loops, segments, before, strict=True):
        own = loop.new_saved(segment[-1].last_row - segment[0].first_row)
        if loop.cell == "lstm":
            own[1] = loop.call.with_c_before(own[1], segment, state[1])
        saved.append(own)
    states, first_rows = [[s.clone() for s in state] for state in before], [part[0].first_row for part in segments]
    _run_forward(loops, segments, states, saved, first_rows)
    return saved


def _sum_over_directions(call: Call, loops: list["_BackwardLoop"], shape: torch.Size) -> Tensor | None:
    """Return the input's gradient, or `None` where nobody wants it."""
    first, *others = [loop.sums.input for loop in loops]
    if first is None:
        return None
    for other in others:
        assert other is not None
        first += other
    return call.rows.spread(first, shape)


def _columns(tensor: Tensor, count: int) -> list[Any]:
    """Cut an output, or its gradient, in each direction's columns."""
    return list(tensor.chunk(count, -1)) if count > 1 else [tensor]


class _ForwardLoop:
    """The forward pass over any of a call's steps, its weights packed; it writes to `output`, unless that is `None`."""

    def __init__(self, cell: str, call: Call, x: Tensor, output: Tensor | None) -> None:
        self.cell, self.call, self.x, self.output = cell, call, x, output
        weights = call.weights
        weight_ih, self.table = (None, table_of(call)) if call.reads_ids else (weights.weight_ih, None)
        factors = (weights.weight_hh, weights.weight_hr, weights.bias_ih, weights.bias_hh)
        self.packed = call.layout.pack_forward(
            *(address(weight_ih), weights.weight_ih.shape[1]), *(address(t) for t in factors)
        )

    def new_saved(self, rows: int) -> list[Tensor]:
        """Make a place for what the backward pass needs, of so many packed rows."""
        return [new(self.call.like, rows, width) for width in saved_widths(self.cell, self.call.weights.hidden)]

    def native_pass(
        self, stretches: list[Stretch], state: list[Tensor], saved: Sequence[Tensor], first_row: int
    ) -> Any:
        """Return the native pass that carries `state` over some stretches.

        `saved`, which it writes to, begins at a packed row; it may be empty.
        """
        call = self.call
        return call.layout.forward_pass(
            [stretch for _, stretch in call.forward_order(stretches)],
            *call.where_input_is(self.x),
            address(self.table),
            first_row,
            *addresses(saved),
            address(self.output),
            *addresses(state),
            *addresses(call.initial),
            self.packed,
        )


class _BackwardLoop:
    """The backward pass over any of a call's steps, its weights packed, and the sums over all of them."""

    def __init__(
        self,
        cell: str,
        call: Call,
        output: Tensor,
        grad_output: Tensor | None,
        grad_final: Sequence[Tensor | None],
        x: Tensor,
        needs_input: bool,
    ) -> None:
        self.call, self.output, self.grad_output, self.x = call, output, grad_output, x
        weights = call.weights
        weight_ih = weights.weight_ih if needs_input else None
        if weight_ih is not None and cell == "gru":
            weight_ih = weight_ih.roll(weights.hidden, 0)
        self.packed = call.layout.pack_backward(
            *(address(weight_ih), weights.weight_ih.shape[1], address(weights.weight_hh), address(weights.weight_hr))
        )
        self.sums = _Sums(cell, call, x, needs_input)
        self.grad_state = [_own(g, s, call.arithmetic) for g, s in zip(grad_final, call.initial, strict=True)]
        self.grad_anew = [torch.zeros_like(g) for g in self.grad_state] if call.reset is not None else []

    def native_pass(self, stretches: list[Stretch], saved: list[Tensor], first_row: int) -> Any:
        """Return the native pass for some stretches; `saved` begins at a packed row."""
        call = self.call
        return call.layout.backward_pass(
            [stretch for _, stretch in call.backward_order(stretches)],
            *call.where_input_is(self.x),
            first_row,
            *addresses(saved),
            *(self.output.data_ptr(), address(self.grad_output)),
            *addresses(self.grad_state),
            *addresses(self.grad_anew),
            *addresses(call.initial),
            self.packed,
            *self.sums.addresses(),
        )

    def grad_initial(self) -> list[Tensor]:
        """Return the gradient of the initial state."""
        if not self.grad_anew:
            return self.grad_state
        return [a + b for a, b in zip(self.grad_state, self.grad_anew, strict=True)]


def _own(gradient: Tensor | None, state: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a state's gradient to be carried along."""
    if gradient is None:
        return torch.zeros_like(state, dtype=dtype)
    return gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _gradient_width(cell: str, hidden: int) -> int:
    return (4 if cell == "gru" else gate_count(cell)) * hidden


class _Sums:
    """The gradients that are sums over all steps, of a GRU's gates in the order n, r, z, and r, z, n for what meets W_hh."""

    def __init__(self, cell: str, call: Call, x: Tensor, needs_input: bool) -> None:
        weights = call.weights
        self.cell, self.call = cell, call
        self.input = new(x, *x.shape) if needs_input else None
        self.weight_ih = new_input_sum(call)
        self.weight_hh = new_zeros(weights.weight_hh, *weights.weight_hh.shape)
        self.weight_hr = None if weights.weight_hr is None else new_zeros(weights.weight_hr, *weights.weight_hr.shape)
        bias = weights.bias_ih
        self.bias_ih = None if bias is None else new_zeros(bias, *bias.shape)
        self.bias_hh = None if bias is None or cell != "gru" else new_zeros(bias, *bias.shape)

    def addresses(self) -> list[int]:
        """Say where they are."""
        return [
            address(t) for t in (self.input, self.weight_ih, self.weight_hh, self.weight_hr, self.bias_ih, self.bias_hh)
        ]

    def to_list(self, dtype: torch.dtype) -> list[Tensor]:
        """Gradients of the parameters, in torch's order."""
        hidden, weight_ih, bias_ih, bias_hh = self.call.weights.hidden, self.weight_ih, self.bias_ih, self.bias_hh
        if self.call.reads_ids:
            if bias_ih is not None:  # which meets every step, whatever its token
                torch.sum(weight_ih, 0, out=bias_ih)
            if self.cell == "gru":
                weight_ih = weight_ih.roll(-hidden, 1)
            weight_ih = as_weight(self.call, weight_ih)
        elif self.cell == "gru":
            weight_ih = weight_ih.roll(-hidden, 0)
        if bias_ih is not None and self.cell == "gru":
            bias_ih = bias_ih.roll(-hidden)
        elif bias_ih is not None:
            bias_hh = bias_ih.clone()
        tensors = [weight_ih, self.weight_hh, bias_ih, bias_hh, self.weight_hr]
        return [t if t.dtype == dtype else t.to(dtype) for t in tensors if t is not None]
