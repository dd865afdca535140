"""The native CPU kernels of plain cells: one layer in one direction, or in both at once, forward and backward through time.

The equations stand in `throughtime.cells`; the time loop is C++ (`csrc/`), chosen for the machine's instruction set when
it is loaded. Work is divided so that the time loop does only what must be sequential: x W_ihᵀ for all steps is one
product before it, and the weights' gradients are one product after it. Both go in stretches of steps, so that
what one writes is still in the cache when the other reads it, and the backward pass needs little memory of its own.

Rows are sorted by length inside, and only real steps have a place in the arrays (torch's PackedSequence order):
time and memory are proportional to the sum of the lengths. Input and output may come and go in that order: packed.

Both directions of a layer are two calls of the time loop, each on its stretch of steps, whose threads never meet; each writes
its half of the output's columns.

In bfloat16 products multiply bfloat16 and sum float32; state, biases, pointwise arithmetic and the sums of the weights'
gradients are float32. Output and what is saved are bfloat16, parameters and their gradients bfloat16 or float32.

Saved for the backward pass, in elements per real step, besides input and output: LSTM 5 H, GRU 4 H, GRU with the reset
gate before the product 3 H, RNN none. With `recompute_every` only the state, at the steps where a segment begins: the backward
pass computes the rest again, a segment at a time. Segments are whole stretches, so that every sum is taken in the same order
and gradients are the same to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from throughtime.arguments import check_token_ids
from throughtime.kernels.layout import (
    Layout,
    Stretch,
    check_memory,
    count_segments,
    expected_saved,
    joined,
    lay_out,
)
from throughtime.kernels.native import address, addresses, contiguous, kind, new, new_zeros
from throughtime.request import Gradient, Request, Result, check_backward, split
from throughtime.spec import Spec


def saved_widths(spec: Spec, hidden: int) -> list[int]:
    """Return the widths of what `Plan.forward` saves; each has a row for every real step of every sequence."""
    if spec.gates == 1:
        return []
    return [spec.gates * hidden, *([hidden] if spec.base in ("lstm", "gru") else [])]


def segment_count(request: Request, hidden: int) -> int:
    """Return how many states `Plan.forward` saves with `recompute_every`; sizes may be symbolic."""
    width = _gradient_width(request.spec, hidden)
    batch = request.initial[0].shape[0]  # a fake `batch_sizes` has no values to be asked for
    return count_segments(request.steps, batch, width, request.dtype, request.recompute_every)


class Plan:
    """A request that has been checked, laid out once for both passes."""

    def __init__(self, request: Request) -> None:
        self._spec = request.spec
        self._layouts = lay_out(request)
        self._threads = torch.get_num_threads()
        self._marks: list[Any] = []

    def let_go(self, request: Request) -> None:
        """Drop input, state and parameters, so that it keeps none of them alive, until `take_up`."""
        self._marks = _marks(request)
        for layout in self._layouts:
            layout.let_go()

    def take_up(self, request: Request) -> "Plan | None":
        """Return the same plan for these tensors, or `None` if they aren't in the same memory, or threads are more or fewer."""
        if self._threads != torch.get_num_threads() or self._marks != _marks(request):
            return None
        plan = object.__new__(Plan)
        plan.__dict__ |= self.__dict__
        each = zip(self._layouts, request.directions, strict=True)
        plan._layouts = [layout.take_up(request, direction) for layout, direction in each]
        return plan

    def forward(self, request: Request, keep: bool) -> Result:
        """Compute the layer; `keep` says that a backward pass will follow."""
        layouts, first = self._layouts, self._layouts[0]
        x, output = first.rows.compact(request.input), first.new_output()
        loops = [
            _ForwardLoop(layout, x, part) for layout, part in zip(layouts, _columns(output, len(layouts)), strict=True)
        ]
        states = [[s.to(first.arithmetic, copy=True) for s in layout.initial] for layout in layouts]
        if keep and request.recompute_every and saved_widths(self._spec, 1):
            segments = first.segments(_gradient_width(self._spec, first.hidden), request.recompute_every)
            saved = run_segments(layouts, segments, states, lambda parts: _run_forward(loops, parts, states))
        else:
            saved = [loop.new_saved(first.rows.count) if keep else [] for loop in loops]
            _run_forward(loops, [first.stretches(first.gates_width)] * len(loops), states, saved)
        final = joined(states)
        if first.dtype != first.arithmetic:
            final = [s.to(first.dtype) for s in final]
        return Result(output, final, joined(saved))

    def backward(
        self,
        request: Request,
        grad_output: Tensor | None,
        grad_final: Sequence[Tensor | None],
        output: Tensor,
        saved: Sequence[Tensor],
        needs_input: bool,
    ) -> Gradient:
        """Backpropagate; a gradient that is `None` is zero."""
        layouts, first, count = self._layouts, self._layouts[0], len(self._layouts)
        widths = saved_widths(self._spec, first.hidden)
        recompute_every = request.recompute_every if widths else 0
        segments = first.segments(_gradient_width(self._spec, first.hidden), recompute_every)
        expected = expected_saved(layouts, widths, segments if recompute_every else None)
        check_backward(request, grad_output, grad_final, output, saved, expected)
        output, saved = contiguous(output), [contiguous(tensor) for tensor in saved]
        check_memory(output=[output], grad_output=[grad_output], grad_final=grad_final, saved=saved)
        x, saved_by_way = first.rows.compact(request.input), split(saved, count)
        if first.reads_ids:  # they may have been written to since `forward`, where autograd doesn't see it
            check_token_ids(x, first.weights.weight_ih.shape[1])
        grads = [None] * count if grad_output is None else _columns(contiguous(grad_output), count)
        needs_input = needs_input and not first.reads_ids
        loops = [
            _BackwardLoop(layout, out, grad, final, x, needs_input)
            for layout, out, grad, final in zip(
                layouts, _columns(output, count), grads, split(grad_final, count), strict=True
            )
        ]
        again = [_ForwardLoop(layout, x, None) for layout in layouts] if recompute_every else []
        for parts in zip(*(layout.backward_order(segments) for layout in layouts), strict=True):
            here, first_rows = [segment for _, segment in parts], [0] * count
            if again:
                before = [[s[number] for s in states] for (number, _), states in zip(parts, saved_by_way, strict=True)]
                saved_here, first_rows = _recompute(again, here, before), [segment[0].first_row for segment in here]
            else:
                saved_here = saved_by_way
            each = zip(loops, here, saved_here, first_rows, strict=True)
            passes = [loop.native_pass(segment, own, first_row) for loop, segment, own, first_row in each]
            kind(first.dtype).backward(*passes)
        grad_initial = joined([loop.grad_initial() for loop in loops])
        if first.dtype != first.arithmetic:
            grad_initial = [g.to(first.dtype) for g in grad_initial]
        grad_parameters = joined([loop.sums.to_list(first.weights_dtype) for loop in loops])
        return Gradient(_sum_over_directions(first, loops, request.input.shape), grad_initial, grad_parameters)


def _marks(request: Request) -> list[Any]:
    """What tells whether tensors are the same and in the same memory."""
    return [(t.data_ptr(), t.shape, t.dtype) for t in (request.input, *request.initial, *request.parameters)]


def run_segments(
    layouts: list[Layout],
    segments: list[list[Stretch]],
    states: list[list[Tensor]],
    run: Callable[[list[list[Stretch]]], None],
) -> list[list[Tensor]]:
    """Run forward loops segment by segment; return the states of each before each of its segments, (segments, B, ·)."""
    saved = [[s.new_empty((len(segments), *s.shape)) for s in state] for state in states]
    for parts in zip(*(layout.forward_order(segments) for layout in layouts), strict=True):
        for (number, _), state, before in zip(parts, states, saved, strict=True):
            for s, all_before in zip(state, before, strict=True):
                all_before[number] = s
        run([segment for _, segment in parts])
    return saved


def _run_forward(
    loops: list["_ForwardLoop"],
    stretches: list[list[Stretch]],
    states: list[list[Tensor]],
    saved: Sequence[Sequence[Tensor]] = ((), ()),
    first_rows: Sequence[int] = (0, 0),
) -> None:
    """Run forward loops at once, each over its stretches."""
    each = zip(loops, stretches, states, saved, first_rows, strict=False)
    passes = [loop.native_pass(own, state, arrays, first_row) for loop, own, state, arrays, first_row in each]
    kind(loops[0].layout.dtype).forward(*passes)


def _recompute(
    loops: list["_ForwardLoop"], segments: list[list[Stretch]], before: list[list[Tensor]]
) -> list[list[Tensor]]:
    """Compute what the backward passes need of their segments, from the states before them."""
    saved = []
    for loop, segment, state in zip(loops, segments, before, strict=True):
        own = loop.new_saved(segment[-1].last_row - segment[0].first_row)
        if loop.layout.spec.base == "lstm":
            own[1] = loop.layout.with_c_before(own[1], segment, state[1])
        saved.append(own)
    states, first_rows = [[s.clone() for s in state] for state in before], [part[0].first_row for part in segments]
    _run_forward(loops, segments, states, saved, first_rows)
    return saved


def _sum_over_directions(layout: Layout, loops: list["_BackwardLoop"], shape: torch.Size) -> Tensor | None:
    """Return the input's gradient, or `None` where nobody wants it."""
    first, *others = [loop.sums.input for loop in loops]
    if first is None:
        return None
    for other in others:
        assert other is not None
        first += other
    return layout.rows.spread(first, shape)


def _columns(tensor: Tensor, count: int) -> list[Any]:
    """Cut an output, or its gradient, in each direction's columns."""
    return list(tensor.chunk(count, -1)) if count > 1 else [tensor]


class _ForwardLoop:
    """The forward pass over any of a layout's steps, its weights packed; it writes to `output`, unless that is `None`."""

    def __init__(self, layout: Layout, x: Tensor, output: Tensor | None) -> None:
        self.layout, self.x, self.output = layout, x, output
        weights = layout.weights
        weight_ih, self.table = (None, layout.table()) if layout.reads_ids else (weights.weight_ih, None)
        factors = (weights.weight_hh, weights.weight_hr, weights.bias_ih, weights.bias_hh)
        self.packed = layout.native.pack_forward(
            *(address(weight_ih), weights.weight_ih.shape[1]), *[address(t) for t in factors]
        )

    def new_saved(self, rows: int) -> list[Tensor]:
        """Make a place for what the backward pass needs, of so many packed rows."""
        return [new(self.layout.like, rows, width) for width in saved_widths(self.layout.spec, self.layout.hidden)]

    def native_pass(
        self, stretches: list[Stretch], state: list[Tensor], saved: Sequence[Tensor], first_row: int
    ) -> Any:
        """Return the native pass that carries `state` over some stretches.

        `saved`, which it writes to, begins at a packed row; it may be empty.
        """
        layout = self.layout
        return layout.native.forward_pass(
            [stretch for _, stretch in layout.forward_order(stretches)],
            *layout.where_input_is(self.x),
            address(self.table),
            first_row,
            *addresses(saved),
            address(self.output),
            *addresses(state),
            *addresses(layout.initial),
            self.packed,
        )


class _BackwardLoop:
    """The backward pass over any of a layout's steps, its weights packed, and the sums over all of them."""

    def __init__(
        self,
        layout: Layout,
        output: Tensor,
        grad_output: Tensor | None,
        grad_final: Sequence[Tensor | None],
        x: Tensor,
        needs_input: bool,
    ) -> None:
        self.layout, self.output, self.grad_output, self.x = layout, output, grad_output, x
        weights = layout.weights
        weight_ih = weights.weight_ih if needs_input else None
        if weight_ih is not None and layout.spec.base == "gru":
            weight_ih = weight_ih.roll(layout.hidden, 0)
        self.packed = layout.native.pack_backward(
            *(address(weight_ih), weights.weight_ih.shape[1], address(weights.weight_hh), address(weights.weight_hr))
        )
        self.sums = _Sums(layout, x, needs_input)
        self.grad_state = [_own(g, s, layout.arithmetic) for g, s in zip(grad_final, layout.initial, strict=True)]
        self.grad_anew = [torch.zeros_like(g) for g in self.grad_state] if layout.reset is not None else []

    def native_pass(self, stretches: list[Stretch], saved: Sequence[Tensor], first_row: int) -> Any:
        """Return the native pass for some stretches; `saved` begins at a packed row."""
        layout = self.layout
        return layout.native.backward_pass(
            [stretch for _, stretch in layout.backward_order(stretches)],
            *layout.where_input_is(self.x),
            first_row,
            *addresses(saved),
            *(self.output.data_ptr(), address(self.grad_output)),
            *addresses(self.grad_state),
            *addresses(self.grad_anew),
            *addresses(layout.initial),
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


def _gradient_width(spec: Spec, hidden: int) -> int:
    return (4 if spec.base == "gru" else spec.gates) * hidden


class _Sums:
    """The gradients that are sums over all steps, of a GRU's gates in the order n, r, z, and r, z, n for what meets W_hh."""

    def __init__(self, layout: Layout, x: Tensor, needs_input: bool) -> None:
        weights = layout.weights
        self.layout, self.is_gru = layout, layout.spec.base == "gru"
        self.input = new(x, *x.shape) if needs_input else None
        self.weight_ih = layout.new_input_sum()
        self.weight_hh = new_zeros(weights.weight_hh, *weights.weight_hh.shape)
        self.weight_hr = None if weights.weight_hr is None else new_zeros(weights.weight_hr, *weights.weight_hr.shape)
        bias = weights.bias_ih
        self.bias_ih = None if bias is None else new_zeros(bias, *bias.shape)
        self.bias_hh = None if bias is None or not self.is_gru else new_zeros(bias, *bias.shape)

    def addresses(self) -> list[int]:
        """Say where they are."""
        return [
            address(t) for t in (self.input, self.weight_ih, self.weight_hh, self.weight_hr, self.bias_ih, self.bias_hh)
        ]

    def to_list(self, dtype: torch.dtype) -> list[Tensor]:
        """Gradients of the parameters, in torch's order."""
        hidden, weight_ih, bias_ih, bias_hh = self.layout.hidden, self.weight_ih, self.bias_ih, self.bias_hh
        if self.layout.reads_ids:
            if bias_ih is not None:  # which meets every step, whatever its token
                torch.sum(weight_ih, 0, out=bias_ih)
            if self.is_gru:
                weight_ih = weight_ih.roll(-hidden, 1)
            weight_ih = self.layout.as_weight(weight_ih)
        elif self.is_gru:
            weight_ih = weight_ih.roll(-hidden, 0)
        if bias_ih is not None and self.is_gru:
            bias_ih = bias_ih.roll(-hidden)
        elif bias_ih is not None:
            bias_hh = bias_ih.clone()
        tensors = [weight_ih, self.weight_hh, bias_ih, bias_hh, self.weight_hr]
        return [t if t.dtype == dtype else t.to(dtype) for t in tensors if t is not None]
