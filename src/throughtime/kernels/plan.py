"""The native CPU kernels: one layer in one direction, or in both at once, forward and backward through time.

The equations stand in `throughtime.cells`; the time loop is C++ (`csrc/`), chosen for the machine's instruction set when
it is loaded. Cells with variants have a loop of their own there; their masks come in drawn, so the equations can be given the
very same ones. Work is divided so that the time loop does only what must be sequential: x W_ihᵀ for all steps is one
product before it, and the weights' gradients are one product after it. Both go in stretches of steps, so that
what one writes is still in the cache when the other reads it, and the backward pass needs little memory of its own.

Rows are sorted by length inside, and only real steps have a place in the arrays (torch's PackedSequence order):
time and memory are proportional to the sum of the lengths. Input and output may come and go in that order: packed.

Both directions of a layer are two calls of the time loop, each on its stretch of steps, whose threads never meet; each writes
its half of the output's columns.

In bfloat16 products multiply bfloat16 and sum float32; state, biases, pointwise arithmetic and the sums of the weights'
gradients are float32. Output and what is saved are bfloat16, parameters and their gradients bfloat16 or float32.

What is saved for the backward pass, besides input and output, each cell says on its page (docs/design.md has the table). With
`recompute_every` that is only the state, at the steps where a segment begins: the backward pass computes the rest again, a
segment at a time. Segments are whole stretches, so that every sum is taken in the same order and gradients are the same to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from throughtime.arguments import check_token_ids
from throughtime.kernels.layout import Layout, Stretch, check_memory, expected_saved, joined, lay_out
from throughtime.kernels.native import address, address_pair, addresses, contiguous, kind, new, new_zeros
from throughtime.request import Gradient, Request, Result, check_backward, split
from throughtime.spec import Parameters


class Plan:
    """A request that has been checked, laid out once for both passes."""

    def __init__(self, request: Request) -> None:
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

    def forward(self, request: Request, keep: bool, in_graph: bool = False) -> Result:
        """Compute the layer.

        Args:
            request: What is asked.
            keep: Whether a backward pass will follow.
            in_graph: Whether the size of what is saved may not depend on the lengths: it then has a row for every step of every
                sequence, as if none ended early.
        """
        layouts, first = self._layouts, self._layouts[0]
        x, output = _read(first, request), first.new_output()
        loops = [
            _ForwardLoop(layout, x, part) for layout, part in zip(layouts, _columns(output, len(layouts)), strict=True)
        ]
        states = [[s.to(first.arithmetic, copy=True) for s in layout.initial] for layout in layouts]
        if keep and request.recompute_every and first.cell.saved:
            segments = first.segments(request.recompute_every)
            saved = _run_segments(layouts, segments, states, lambda parts: _run_forward(loops, parts, states))
        else:
            saved = [_new_saved(layout, in_graph) if keep else [] for layout in layouts]
            _run_forward(loops, [first.forward_stretches()] * len(loops), states, saved)
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
        recompute_every = request.recompute_every if first.cell.saved else 0
        segments = first.segments(recompute_every)
        expected = expected_saved(layouts, saved, segments if recompute_every else None)
        check_backward(request, grad_output, grad_final, output, saved, expected)
        output, saved = contiguous(output), [contiguous(tensor) for tensor in saved]
        check_memory(output=[output], grad_output=[grad_output], grad_final=grad_final, saved=saved)
        x, saved_by_way = _read(first, request), split(saved, count)
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
            here, first_kept_rows = [segment for _, segment in parts], [0] * count
            if again:
                before = [[s[number] for s in states] for (number, _), states in zip(parts, saved_by_way, strict=True)]
                saved_here, first_kept_rows = (
                    _recompute(again, here, before),
                    [segment[0].first_row for segment in here],
                )
            else:
                saved_here = saved_by_way
            each = zip(loops, here, saved_here, first_kept_rows, strict=True)
            passes = [loop.native_pass(segment, own, first_kept_row) for loop, segment, own, first_kept_row in each]
            kind(first.dtype).backward(*passes)
        grad_initial = joined([loop.grad_initial() for loop in loops])
        if first.dtype != first.arithmetic:
            grad_initial = [g.to(first.dtype) for g in grad_initial]
        grad_parameters = joined([loop.sums.to_list(first.weights_dtype) for loop in loops])
        return Gradient(_sum_over_directions(first, loops, request.input.shape), grad_initial, grad_parameters)


def _new_saved(layout: Layout, in_graph: bool) -> list[Tensor]:
    return layout.new_saved_in_graph() if in_graph else layout.new_saved(layout.rows.count)


def _read(layout: Layout, request: Request) -> Tensor:
    """Return the input as it is read. Of ids that is a copy, checked anew: since the first check they may have been written to."""
    x = layout.rows.compact(request.input)
    if layout.reads_ids:
        check_token_ids(x, layout.weights.weight_ih.shape[1])
    return x


def _marks(request: Request) -> list[Any]:
    """What tells whether tensors are the same and in the same memory."""
    return [(t.data_ptr(), t.shape, t.dtype) for t in (request.input, *request.initial, *request.parameters)]


def _run_segments(
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
    first_kept_rows: Sequence[int] = (0, 0),
) -> None:
    """Run forward loops at once, each over its stretches."""
    each = zip(loops, stretches, states, saved, first_kept_rows, strict=False)
    passes = [loop.native_pass(own, state, arrays, first_kept_row) for loop, own, state, arrays, first_kept_row in each]
    kind(loops[0].layout.dtype).forward(*passes)


def _recompute(
    loops: list["_ForwardLoop"], segments: list[list[Stretch]], before: list[list[Tensor]]
) -> list[list[Tensor]]:
    """Compute what the backward passes need of their segments, from the states before them."""
    saved = []
    for loop, segment, state in zip(loops, segments, before, strict=True):
        layout = loop.layout
        own = layout.new_saved(segment[-1].last_row - segment[0].first_row)
        if "c" in layout.spec.states:
            kept = [it.name for it in layout.cell.saved].index("kept")
            own[kept] = layout.with_c_before(own[kept], segment, state[1])
        saved.append(own)
    states, first_kept_rows = [[s.clone() for s in state] for state in before], [part[0].first_row for part in segments]
    _run_forward(loops, segments, states, saved, first_kept_rows)
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
        weight_ih, self.table = (None, layout.table()) if layout.reads_ids else (layout.weights.weight_ih, None)
        self.packed = layout.native.pack_forward(**layout.where_weights_are(weight_ih))

    def native_pass(
        self, stretches: list[Stretch], state: list[Tensor], saved: Sequence[Tensor], first_kept_row: int
    ) -> Any:
        """Return the native pass that carries `state` over some stretches.

        `saved`, which it writes to, begins at a packed row; it may be empty.
        """
        layout, where = self.layout, self.layout.where_saved_is(saved)
        x, width, stride, ids = layout.where_input_is(self.x)
        h, c = address_pair(state)
        initial_h, initial_c = address_pair(layout.initial)
        return layout.native.forward_pass(
            [stretch for _, stretch in layout.forward_order(stretches)],
            x=x,
            ids=ids,
            width=width,
            stride=stride,
            table=address(self.table),
            gates=where.get("gates", 0),
            kept=where.get("kept", 0),
            w=where.get("w", 0),
            u=where.get("u", 0),
            norms=where.get("norms", 0),
            output=address(self.output),
            h=h,
            c=c,
            initial_h=initial_h,
            initial_c=initial_c,
            first_kept_row=first_kept_row,
            packed=self.packed,
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
        weight_ih = layout.weights.weight_ih if needs_input else None
        self.packed = layout.native.pack_backward(**layout.where_weights_are(weight_ih))
        self.sums = _Sums(layout, x, needs_input)
        self.grad_state = [_own(g, s, layout.arithmetic) for g, s in zip(grad_final, layout.initial, strict=True)]
        self.grad_anew = [torch.zeros_like(g) for g in self.grad_state] if layout.reset is not None else []

    def native_pass(self, stretches: list[Stretch], saved: Sequence[Tensor], first_kept_row: int) -> Any:
        """Return the native pass for some stretches; `saved` begins at a packed row."""
        layout, sums, where = self.layout, self.sums, self.layout.where_saved_is(saved)
        x, width, stride, ids = layout.where_input_is(self.x)
        grad_h, grad_c = address_pair(self.grad_state)
        grad_initial_h, grad_initial_c = address_pair(self.grad_anew)
        initial_h, initial_c = address_pair(layout.initial)
        return layout.native.backward_pass(
            [stretch for _, stretch in layout.backward_order(stretches)],
            x=x,
            ids=ids,
            width=width,
            stride=stride,
            gates=where.get("gates", 0),
            kept=where.get("kept", 0),
            w=where.get("w", 0),
            u=where.get("u", 0),
            norms=where.get("norms", 0),
            output=self.output.data_ptr(),
            grad_output=address(self.grad_output),
            grad_h=grad_h,
            grad_c=grad_c,
            grad_initial_h=grad_initial_h,
            grad_initial_c=grad_initial_c,
            initial_h=initial_h,
            initial_c=initial_c,
            sums=address(sums.by_unit),
            grad_input=address(sums.input),
            sum_ih=sums.weight_ih.data_ptr(),
            sum_hh=sums.weight_hh.data_ptr(),
            sum_hr=address(sums.weight_hr),
            sum_bias_ih=address(sums.bias_ih),
            sum_bias_hh=address(sums.bias_hh),
            first_kept_row=first_kept_row,
            packed=self.packed,
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


class _Sums:
    """The gradients that are sums over all steps, where a native pass adds them up; those of a variant's vectors by unit."""

    def __init__(self, layout: Layout, x: Tensor, needs_input: bool) -> None:
        weights = layout.weights
        self.layout, self.input = layout, new(x, *x.shape) if needs_input else None
        self.weight_ih, self.weight_hh = layout.new_input_sum(), _zeros(weights.weight_hh)
        self.weight_hr = None if weights.weight_hr is None else _zeros(weights.weight_hr)
        self.bias_ih = self.bias_hh = self.by_unit = None
        if layout.spec.variants:
            self.by_unit = new_zeros(weights.weight_hh, layout.native.sums_size)
        elif weights.bias_ih is not None:
            self.bias_ih = _zeros(weights.bias_ih)
            self.bias_hh = _zeros(weights.bias_ih) if layout.cell.has_own_bias_hh else None

    def to_list(self, dtype: torch.dtype) -> list[Tensor]:
        """Gradients of the parameters, in torch's order, then the variants'."""
        of_vectors = self._biases() if self.by_unit is None else self._of_variant(self.by_unit)
        weight_ih = self.layout.as_weight(self.weight_ih)
        made = Parameters(weight_ih, self.weight_hh, weight_hr=self.weight_hr, **of_vectors)
        return [t if t.dtype == dtype else t.to(dtype) for t in made if t is not None]

    def _biases(self) -> dict[str, Tensor]:
        bias_ih, bias_hh = self.bias_ih, self.bias_hh
        if bias_ih is None:
            return {}
        if self.layout.reads_ids:  # a bias meets every step, whatever its token
            torch.sum(self.weight_ih, 0, out=bias_ih)
        return {"bias_ih": bias_ih, "bias_hh": bias_ih.clone() if bias_hh is None else bias_hh}

    def _of_variant(self, by_unit: Tensor) -> dict[str, Tensor]:
        weights = self.layout.weights._asdict()
        names = ("bias_ih", "bias_hh", *self.layout.spec.variant_parameters)
        made = {name: torch.empty_like(weights[name]) for name in names if weights[name] is not None}
        self.layout.native.add_up(**addresses(made), sums=by_unit.data_ptr())
        return made


def _zeros(like: Tensor) -> Tensor:
    return new_zeros(like, *like.shape)
