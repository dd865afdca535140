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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.arguments import check_backward, check_directions, check_forward, check_input, steps_and_batch

try:
    _native: Any = import_module("throughtime.kernels._native")
except ImportError as error:
    _native = None
    _missing = f"the native kernels aren't built ({error}); install throughtime where a C++17 compiler is"

_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "gru_reset_before": 4}
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

_LARGE = 1 << 20  # bytes from which memory is pooled
_STRETCH = 4 << 20  # bytes of gates that the cache holds from one pass over them to the next


def refusal(cell: str, input: Tensor) -> str | None:
    """Return why the native kernels can't serve a request, or `None` where they can."""
    if _native is None:
        return _missing
    base, *variants = cell.split("+")
    if base not in _CELLS:
        return f"they have no {base} cell"
    if variants and input.dtype == torch.bfloat16:
        return f"they compute {', '.join(variants).replace('_', ' ')} in float32 and float64, not in bfloat16"
    if input.device.type != "cpu" or input.dtype not in _DTYPES:
        return f"they compute float32, float64 and bfloat16 on the CPU, not {input.dtype} on {input.device.type}"
    return None


def description() -> str:
    """Say in a line what the kernels are, or why there are none."""
    return _missing if _native is None else f"C++ kernels for the CPU, {instruction_set()}"


def saved_widths(cell: str, hidden: int) -> list[int]:
    """Return the widths of what `forward` keeps; each has a row for every real step of every sequence."""
    if cell.startswith("rnn"):
        return []
    return [_GATES[cell] * hidden, *([hidden] if cell in ("lstm", "gru") else [])]


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state, sums and pointwise arithmetic."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def segment_count(cell: str, steps: int, batch: int, hidden: int, dtype: torch.dtype, every: int) -> int:
    """Return how many states `forward` keeps with `recompute_every`; sizes may be symbolic."""
    return count_segments(steps, batch, _gradient_width(cell, hidden), dtype, every)


def count_segments(steps: int, batch: int, width: int, dtype: torch.dtype, every: int) -> int:
    """Return how many segments of at least `every` steps there are, with so many values a step in the backward pass."""
    larger: Any = torch.sym_max
    stretch = larger(1, _STRETCH // larger(1, batch * width * arithmetic_of(dtype).itemsize))
    stretches = larger(1, -(-steps // stretch))
    return -(-stretches // -(-every // stretch))


def instruction_set() -> str:
    """Name the instruction set in use: avx512_bf16, avx512, avx2 or generic."""
    return _native.instruction_set()


def instruction_sets() -> list[str]:
    """Name those that this machine can run, the fastest first."""
    return _native.instruction_sets()


def use_instruction_set(name: str) -> None:
    """Use another instruction set from now on, in the whole process: for tests and measurements."""
    _native.use_instruction_set(name)


class MemoryUse(NamedTuple):
    """Bytes of pooled memory: in arrays that somebody still holds, and kept for the next ones."""

    used: int
    idle: int


def memory_use() -> MemoryUse:
    """Say how much memory the kernels' large arrays take."""
    return MemoryUse(*_native.memory_use())


def release_memory() -> None:
    """Hand memory that is kept for the next call back to the system."""
    _native.release_memory()


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
        self._calls = _both_directions(*given) if bidirectional else [_Call(*given)]
        self._threads = torch.get_num_threads()
        self._marks: list[Any] = []

    def let_go(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> None:
        """Drop the tensors which it was made of, so that it keeps none alive, until `take_up`."""
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
        return output, [s.to(call.dtype) for s in _joined(states)], _joined(saved)

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
        output, saved = _plain(output), [_plain(tensor) for tensor in saved]
        _check_memory(output=[output], grad_output=[grad_output], grad_final=grad_final, saved=saved)
        x, kept = call.rows.compact(input), shares(saved, count)
        outputs = _columns(output, count)
        grads = [None] * count if grad_output is None else _columns(_plain(grad_output), count)
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
            _kind(call.dtype).backward(*passes)
        dtype = call.weights_dtype
        return Gradient(
            _sum_over_directions(call, loops, input.shape),
            [g.to(call.dtype) for g in _joined([loop.grad_initial() for loop in loops])],
            _joined([loop.sums.to_list(dtype) for loop in loops]),
        )


def _marks(input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> list[Any]:
    """What tells whether tensors are the same and in the same memory."""
    return [(t.data_ptr(), t.shape, t.dtype) for t in (input, *initial, *parameters)]


def run_segments(
    calls: list["_Call"],
    segments: list[list["_Stretch"]],
    states: list[list[Tensor]],
    run: Callable[[list[list["_Stretch"]]], None],
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
    stretches: list[list["_Stretch"]],
    states: list[list[Tensor]],
    saved: Sequence[Sequence[Tensor]] = ((), ()),
    first_rows: Sequence[int] = (0, 0),
) -> None:
    """Run forward loops at once, each over its stretches."""
    each = zip(loops, stretches, states, saved, first_rows, strict=False)
    passes = [loop.native_pass(own, state, kept, first) for loop, own, state, kept, first in each]
    _kind(loops[0].call.dtype).forward(*passes)


def _recompute(
    loops: list["_ForwardLoop"], segments: list[list["_Stretch"]], before: list[list[Tensor]]
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


def _sum_over_directions(call: "_Call", loops: list["_BackwardLoop"], shape: torch.Size) -> Tensor | None:
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


def shares(tensors: Sequence[Any], count: int) -> list[Any]:
    """Cut a list of tensors in each direction's own."""
    if count == 1:
        return [tensors]
    own = len(tensors) // count
    return [tensors[first : first + own] for first in range(0, own * count, own)] if own else [[]] * count


def _joined(lists: list[list[Tensor]]) -> list[Tensor]:
    return list(chain.from_iterable(lists))


class _ForwardLoop:
    """The forward pass over any of a call's steps, its weights packed; it writes to `output`, unless that is `None`."""

    def __init__(self, cell: str, call: "_Call", x: Tensor, output: Tensor | None) -> None:
        self.cell, self.call, self.x, self.output = cell, call, x, output
        weights = call.weights
        weight_ih, self.table = (None, table_of(call)) if call.reads_ids else (weights.weight_ih, None)
        factors = (weights.weight_hh, weights.weight_hr, weights.bias_ih, weights.bias_hh)
        self.packed = call.layout.pack_forward(
            *(_address(weight_ih), weights.weight_ih.shape[1]), *(_address(t) for t in factors)
        )

    def new_saved(self, rows: int) -> list[Tensor]:
        """Make a place for what the backward pass needs, of so many packed rows."""
        return [_new(self.call.like, rows, width) for width in saved_widths(self.cell, self.call.weights.hidden)]

    def native_pass(
        self, stretches: list["_Stretch"], state: list[Tensor], saved: Sequence[Tensor], first_row: int
    ) -> Any:
        """Return the native pass that carries `state` over some stretches.

        `saved`, which it writes to, begins at a packed row; it may be empty.
        """
        call = self.call
        return call.layout.forward_pass(
            [stretch for _, stretch in call.forward_order(stretches)],
            *call.where_input_is(self.x),
            _address(self.table),
            first_row,
            *_addresses(saved),
            _address(self.output),
            *_addresses(state),
            *_addresses(call.initial),
            self.packed,
        )


class _BackwardLoop:
    """The backward pass over any of a call's steps, its weights packed, and the sums over all of them."""

    def __init__(
        self,
        cell: str,
        call: "_Call",
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
            *(_address(weight_ih), weights.weight_ih.shape[1], _address(weights.weight_hh), _address(weights.weight_hr))
        )
        self.sums = _Sums(cell, call, x, needs_input)
        self.grad_state = [_own(g, s, call.arithmetic) for g, s in zip(grad_final, call.initial, strict=True)]
        self.grad_anew = [torch.zeros_like(g) for g in self.grad_state] if call.reset is not None else []

    def native_pass(self, stretches: list["_Stretch"], saved: list[Tensor], first_row: int) -> Any:
        """Return the native pass for some stretches; `saved` begins at a packed row."""
        call = self.call
        return call.layout.backward_pass(
            [stretch for _, stretch in call.backward_order(stretches)],
            *call.where_input_is(self.x),
            first_row,
            *_addresses(saved),
            *(self.output.data_ptr(), _address(self.grad_output)),
            *_addresses(self.grad_state),
            *_addresses(self.grad_anew),
            *_addresses(call.initial),
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


class _Weights(NamedTuple):
    gates: int
    hidden: int
    projected: int
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None

    def to(self, dtype: torch.dtype) -> "_Weights":
        """Return them in another dtype."""
        if self.weight_hh.dtype == dtype:
            return self
        return self._replace(**{n: t.to(dtype) for n, t in self._asdict().items() if isinstance(t, Tensor)})


def _gate_count(cell: str) -> int:
    base, *variants = cell.split("+")
    return 3 if "coupled" in variants else _GATES[base]


def _read_weights(gates: int, parameters: list[Tensor], reads_ids: bool) -> _Weights:
    # Columns of a table may lie together: that is how token ids will read it.
    weight_ih = parameters[0].resolve_neg() if reads_ids else _plain(parameters[0])
    tensors: list[Tensor | None] = [weight_ih, *(_plain(p) for p in parameters[1:])]
    if len(tensors) < 4:
        tensors[2:2] = [None, None]
    if len(tensors) < 5:
        tensors.append(None)
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = tensors
    assert weight_ih is not None
    assert weight_hh is not None
    projected = 0 if weight_hr is None else weight_hr.shape[0]
    hidden = weight_hh.shape[0] // gates
    return _Weights(gates, hidden, projected, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)


class _Stretch(NamedTuple):
    """Some steps of the sequence and where their rows lie in packed arrays."""

    begin: int
    end: int
    first_row: int
    last_row: int


@dataclass(frozen=True)
class _Rows:
    """Which rows take part in which step, longest first; with every row in every step, nothing need be said.

    Where `batch_sizes` say it, arrays come and go packed.
    """

    steps: int
    batch: int
    lengths: Tensor | None
    batch_sizes: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether some rows end before the last step."""
        return self.lengths is not None or self.batch_sizes is not None

    @cached_property
    def _plan(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.lengths is not None
        lengths = self.lengths.contiguous()
        sizes = self.batch, self.steps, self.steps, int(lengths.sum())
        plan = order, rows, first_row, index = tuple(lengths.new_empty(size) for size in sizes)
        _native.plan_rows(lengths.data_ptr(), self.batch, self.steps, *(tensor.data_ptr() for tensor in plan))
        return order, rows, first_row, index

    @property
    def order(self) -> Tensor | None:
        """Column of the batch, for each rank (B,)."""
        return None if self.lengths is None else self._plan[0]

    @property
    def rows(self) -> Tensor | None:
        """How many take part in each step (T,)."""
        return self.batch_sizes if self.lengths is None else self._plan[1]

    @cached_property
    def first_row(self) -> Tensor | None:
        """Where a step's rows begin in packed arrays (T,)."""
        if self.batch_sizes is not None:
            return self.batch_sizes.cumsum(0) - self.batch_sizes
        return None if self.lengths is None else self._plan[2]

    @property
    def index(self) -> Tensor:
        """Row of the padded (T · B, ·) array, for each row of the packed one."""
        return self._plan[3]

    @cached_property
    def count(self) -> int:
        """Rows of a packed array: the sum of the lengths."""
        if self.batch_sizes is not None:
            return int(self.batch_sizes.sum())
        return self.steps * self.batch if self.lengths is None else len(self.index)

    def compact(self, input: Tensor) -> Tensor:
        """(T, B, ·), or ids (T, B), to packed; what is packed stays so."""
        is_packed = input.dim() == (2 if input.is_floating_point() else 1)
        flat = input.resolve_neg() if is_packed else input.resolve_neg().flatten(0, 1)
        if self.lengths is not None:
            return torch.index_select(flat, 0, self.index, out=_new(flat, self.count, *flat.shape[1:]))
        return flat if flat.stride(-1) == 1 else flat.contiguous()  # the products step over rows, not within one

    def spread(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Packed to (T, B, ·), with zeros elsewhere, or to what is packed itself."""
        if self.lengths is None:
            return packed.view(shape)
        padded = new_zeros(packed, self.steps * self.batch, shape[-1])
        return padded.index_copy_(0, self.index, packed).view(shape)

    def stretches(self, width: int, element_size: int) -> Iterator[_Stretch]:
        """Cut the steps into stretches whose gates fit the cache."""
        steps = max(1, _STRETCH // max(1, self.batch * width * element_size))
        ends = [*range(steps, self.steps, steps), self.steps]
        if self.first_row is None:
            last_rows = [end * self.batch for end in ends]
        else:
            last_rows = [*self.first_row[ends[:-1]].tolist(), self.count]
        yield from map(_Stretch, [0, *ends], ends, [0, *last_rows], last_rows)


class _Call:
    """A request, checked and laid out."""

    def __init__(
        self,
        cell: str,
        input: Tensor,
        initial: list[Tensor],
        parameters: list[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
        batch_sizes: Tensor | None = None,
        extra: Sequence[str] = (),
        masks: Sequence[Tensor] = (),
        mask_names: Sequence[str] = (),
        other: "_Call | None" = None,
        directions: int = 1,
    ) -> None:
        """Check and lay out, with the rows of `other`, which runs the other way, if there is one."""
        check_input(input, batch_sizes)
        self.reads_ids = not input.is_floating_point()
        like = initial[0] if self.reads_ids and initial else input
        self.dtype = like.dtype
        if (reason := refusal(cell, like)) is not None:
            raise NotImplementedError(f"input can't be served: {reason}")
        self.arithmetic = arithmetic_of(self.dtype)
        base = cell.partition("+")[0]
        states, dtypes = 2 if base == "lstm" else 1, (self.dtype, self.arithmetic)
        check_forward(
            *(cell, _gate_count(cell), states, input, initial, parameters, dtypes, lengths, reset),
            *(extra, masks, mask_names, batch_sizes),
        )
        steps, batch = steps_and_batch(input, batch_sizes)
        self._gates = _gate_count(cell)
        self._hold(input, initial, parameters[: len(parameters) - len(extra)])
        _check_memory(input=[input], initial=self.initial, parameters=self.weights[3:])
        if lengths is not None and bool((lengths == steps).all()):
            lengths = None
        self._is_packed = batch_sizes is not None
        if batch_sizes is not None:
            batch_sizes = None if int(batch_sizes[-1]) == batch else batch_sizes.contiguous()
        self.rows = other.rows if other is not None else _Rows(steps, batch, lengths, batch_sizes)
        self.directions = directions
        self.reset = None if reset is None else reset.contiguous()
        self.reverse = reverse
        self.layout = _kind(self.dtype)(
            *(_CELLS[base], bool(reverse), torch.get_num_threads(), steps, batch),
            *(self.weights.hidden, self.weights.projected),
            *(_address(t) for t in (self.rows.rows, self.rows.first_row, self.rows.order, self.reset)),
            *(batch_sizes is not None, directions * self.width),
        )

    def _hold(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> None:
        self.like = initial[0] if self.reads_ids else input
        self.initial = [_plain(s) for s in initial]
        self.weights_dtype = parameters[0].dtype
        self.weights = _read_weights(self._gates, parameters, self.reads_ids).to(self.arithmetic)

    def let_go(self) -> None:
        """Drop the tensors which it was made of."""
        del self.like, self.initial, self.weights

    def take_up(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> "_Call":
        """Return the same request for tensors like those which it was made of."""
        call = object.__new__(_Call)
        call.__dict__ |= self.__dict__
        call._hold(input, initial, parameters)
        return call

    def where_input_is(self, x: Tensor) -> tuple[int, int, int, int]:
        """Address, width and stride of packed rows, and address of packed ids; one of the two is there."""
        width = self.weights.weight_ih.shape[1]
        return (0, width, 0, x.data_ptr()) if self.reads_ids else (x.data_ptr(), width, x.stride(0), 0)

    def stretches(self, width: int) -> list["_Stretch"]:
        """Cut the steps into stretches whose gates fit the cache."""
        return list(self.rows.stretches(width, self.arithmetic.itemsize))

    def segments(self, width: int, every: int) -> list[list["_Stretch"]]:
        """Group the stretches of a backward pass such that each has `every` steps at least; 0 makes one segment of them all."""
        stretches = self.stretches(width)
        count = -(-every // max(1, stretches[0].end)) if every else len(stretches)
        return [stretches[first : first + count] for first in range(0, len(stretches), count)]

    def forward_order(self, parts: list[Any]) -> list[tuple[int, Any]]:
        """Number stretches or segments, in the order in which the forward pass runs through them."""
        return [*enumerate(parts)][:: -1 if self.reverse else 1]

    def backward_order(self, parts: list[Any]) -> list[tuple[int, Any]]:
        """Number them in the order of the backward pass."""
        return self.forward_order(parts)[::-1]

    def with_c_before(self, kept: Tensor, segment: list["_Stretch"], c: Tensor) -> Tensor:
        """Return `kept` of a segment, in memory whose rows beside it hold the c before: (B, H), of each row of the step before."""
        step = segment[-1].end if self.reverse else segment[0].begin - 1
        if not 0 <= step < self.rows.steps:
            return kept
        count = self.rows.batch if self.rows.rows is None else int(self.rows.rows[step])
        before = c if self.rows.order is None else c[self.rows.order[:count]]
        both = _new(kept, len(kept) + count, kept.shape[1])
        beside, own = both.split([len(kept), count])[::-1] if self.reverse else both.split([count, len(kept)])
        beside.copy_(before[:count])
        return own

    @property
    def width(self) -> int:
        """P, the width of h."""
        return self.weights.projected or self.weights.hidden

    def new_output(self) -> Tensor:
        """A place for the output; what lies past a row's end is zero, and the kernels don't write there."""
        width = self.directions * self.width
        if self._is_packed:
            return _new(self.like, self.rows.count, width)
        shape = (self.rows.steps, self.rows.batch, width)
        return _new(self.like, *shape) if self.rows.lengths is None else new_zeros(self.like, *shape)


def _both_directions(
    cell: str,
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> list[_Call]:
    """Check and lay out both directions of a layer."""
    check_directions(reverse, initial, parameters)
    calls: list[_Call] = []
    for states, weights in zip(shares(initial, 2), shares(parameters, 2), strict=True):
        given = (cell, input, states, weights, lengths, reset, bool(calls), batch_sizes)
        calls.append(_Call(*given, other=calls[0] if calls else None, directions=2))
    return calls


def check_saved(
    calls: list[_Call],
    input: Tensor,
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: list[Tensor],
    widths: list[int],
    segments: list[Any] | None,
) -> None:
    """Check what a backward pass is given; with `segments`, `saved` are the states before each of them."""
    call, initial = calls[0], _joined([each.initial for each in calls])
    shapes: list[tuple[int, ...]] = [(call.rows.count, width) for width in widths] * len(calls)
    if segments is not None:
        shapes = [(len(segments), *s.shape) for s in initial]
    dtype = None if segments is None else call.arithmetic
    check_backward(input, initial, grad_output, grad_final, output, saved, shapes, dtype, len(calls))


def _check_memory(**tensors: Sequence[Tensor | None]) -> None:
    """Refuse tensors that only stand for others: a subclass's wrapper, torch's own way to say zero."""
    for name, group in tensors.items():
        for tensor in group:
            if tensor is not None and tensor.numel() and not tensor.data_ptr():
                raise TypeError(f"{name}: a {type(tensor).__name__} without memory of its own; expected a plain tensor")


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor as it is read by address: without gaps, and its elements' signs in its memory."""
    return tensor.resolve_neg().contiguous()


def _gradient_width(cell: str, hidden: int) -> int:
    return (4 if cell == "gru" else _GATES[cell]) * hidden


class _Sums:
    """The gradients that are sums over all steps, of a GRU's gates in the order n, r, z, and r, z, n for what meets W_hh."""

    def __init__(self, cell: str, call: _Call, x: Tensor, needs_input: bool) -> None:
        weights = call.weights
        self.cell, self.call = cell, call
        self.input = _new(x, *x.shape) if needs_input else None
        self.weight_ih = new_input_sum(call)
        self.weight_hh = new_zeros(weights.weight_hh, *weights.weight_hh.shape)
        self.weight_hr = None if weights.weight_hr is None else new_zeros(weights.weight_hr, *weights.weight_hr.shape)
        bias = weights.bias_ih
        self.bias_ih = None if bias is None else new_zeros(bias, *bias.shape)
        self.bias_hh = None if bias is None or cell != "gru" else new_zeros(bias, *bias.shape)

    def addresses(self) -> list[int]:
        """Say where they are."""
        return [
            _address(t)
            for t in (self.input, self.weight_ih, self.weight_hh, self.weight_hr, self.bias_ih, self.bias_hh)
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
        return [tensor.to(dtype) for tensor in tensors if tensor is not None]


@cache
def _kind(dtype: torch.dtype) -> Any:
    names = {torch.float32: "LayoutF32", torch.float64: "LayoutF64", torch.bfloat16: "LayoutBf16"}
    return getattr(_native, names[dtype])


def table_of(call: _Call) -> Tensor:
    """Return W_ih x of each token id (V, G·H): the transposed weights, rounded as for the product with one-hot vectors."""
    weight = call.weights.weight_ih
    return weight.to(call.dtype).to(weight.dtype).t().contiguous()


def new_input_sum(call: _Call) -> Tensor:
    """Return zeros to which the gradient of W_ih is added; token ids choose rows of its transpose."""
    gate_rows, columns = call.weights.weight_ih.shape
    shape = (columns, gate_rows) if call.reads_ids else (gate_rows, columns)
    return new_zeros(call.weights.weight_ih, *shape)


def as_weight(call: _Call, sum: Tensor) -> Tensor:
    """Return what was added up in `new_input_sum` in the shape of W_ih: a gradient has its weight's layout."""
    if not call.reads_ids:
        return sum
    return sum.t().contiguous() if call.weights.weight_ih.is_contiguous() else sum.t()


def _new(like: Tensor, *shape: int) -> Tensor:
    """Return an array of arbitrary content, as `like.new_empty`, but in pooled memory if it is large."""
    count = math.prod(shape)
    if count * like.element_size() < _LARGE or like.dtype not in _DTYPES:
        return like.new_empty(shape)
    kind = _kind(like.dtype)
    if like.dtype == torch.bfloat16:  # whose arrays come as floats of half the number
        tensor = kind.new_array((count + 1) // 2).view(like.dtype)[:count].view(shape)
    else:
        tensor = kind.new_array(count).view(shape)
    if torch.are_deterministic_algorithms_enabled():  # as torch fills its own
        tensor.fill_(torch.nan)
    return tensor


def new_zeros(like: Tensor, *shape: int) -> Tensor:
    """Return zeros, as `like.new_zeros`, without torch's threads: beside a busy process they may come late (csrc/threads.h)."""
    tensor = _new(like, *shape)
    _native.clear(tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())
    return tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Addresses of up to two tensors."""
    first, second = [*tensors, None, None][:2]
    return _address(first), _address(second)
