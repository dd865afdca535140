"""A request to the native kernels: one layer in one direction, checked, and laid out as they read it.

Rows are sorted by length, and only real steps have a place in the arrays (torch's PackedSequence order): time and memory are
proportional to the sum of the lengths. Steps are cut in stretches, in which the time loop and the products around it take turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.arguments import check_backward, check_directions, check_forward, check_input, steps_and_batch
from throughtime.kernels import native
from throughtime.kernels.native import address, arithmetic_of, kind, new, new_zeros, plain

_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
_STRETCH = 4 << 20  # bytes of gates that the cache holds from one pass over them to the next


def count_segments(steps: int, batch: int, width: int, dtype: torch.dtype, every: int) -> int:
    """Return how many segments of at least `every` steps there are, with so many values a step in the backward pass."""
    larger: Any = torch.sym_max
    stretch = larger(1, _STRETCH // larger(1, batch * width * arithmetic_of(dtype).itemsize))
    stretches = larger(1, -(-steps // stretch))
    return -(-stretches // -(-every // stretch))


class Weights(NamedTuple):
    """A layer's parameters in one direction, as they are read by address, and their sizes; `projected` is P, or 0."""

    gates: int
    hidden: int
    projected: int
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None

    def to(self, dtype: torch.dtype) -> "Weights":
        """Return them in another dtype."""
        if self.weight_hh.dtype == dtype:
            return self
        return self._replace(**{n: t.to(dtype) for n, t in self._asdict().items() if isinstance(t, Tensor)})


def gate_count(cell: str) -> int:
    """Return how many gates a cell has, with its variants."""
    base, *variants = cell.split("+")
    return 3 if "coupled" in variants else _GATES[base]


def _read_weights(gates: int, parameters: list[Tensor], reads_ids: bool) -> Weights:
    # Columns of a table may lie together: that is how token ids will read it.
    weight_ih = parameters[0].resolve_neg() if reads_ids else plain(parameters[0])
    tensors: list[Tensor | None] = [weight_ih, *(plain(p) for p in parameters[1:])]
    if len(tensors) < 4:
        tensors[2:2] = [None, None]
    if len(tensors) < 5:
        tensors.append(None)
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = tensors
    assert weight_ih is not None
    assert weight_hh is not None
    projected = 0 if weight_hr is None else weight_hr.shape[0]
    hidden = weight_hh.shape[0] // gates
    return Weights(gates, hidden, projected, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)


class Stretch(NamedTuple):
    """Some steps of the sequence and where their rows lie in packed arrays."""

    begin: int
    end: int
    first_row: int
    last_row: int


@dataclass(frozen=True)
class Rows:
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
        native.module.plan_rows(lengths.data_ptr(), self.batch, self.steps, *(tensor.data_ptr() for tensor in plan))
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
            return torch.index_select(flat, 0, self.index, out=new(flat, self.count, *flat.shape[1:]))
        return flat if flat.stride(-1) == 1 else flat.contiguous()  # the products step over rows, not within one

    def spread(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Packed to (T, B, ·), with zeros elsewhere, or to what is packed itself."""
        if self.lengths is None:
            return packed.view(shape)
        padded = new_zeros(packed, self.steps * self.batch, shape[-1])
        return padded.index_copy_(0, self.index, packed).view(shape)

    def stretches(self, width: int, element_size: int) -> Iterator[Stretch]:
        """Cut the steps into stretches whose gates fit the cache."""
        steps = max(1, _STRETCH // max(1, self.batch * width * element_size))
        ends = [*range(steps, self.steps, steps), self.steps]
        if self.first_row is None:
            last_rows = [end * self.batch for end in ends]
        else:
            last_rows = [*self.first_row[ends[:-1]].tolist(), self.count]
        yield from map(Stretch, [0, *ends], ends, [0, *last_rows], last_rows)


class Call:
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
        other: "Call | None" = None,
        directions: int = 1,
    ) -> None:
        """Check and lay out, with the rows of `other`, which runs the other way, if there is one."""
        check_input(input, batch_sizes)
        self.reads_ids = not input.is_floating_point()
        like = initial[0] if self.reads_ids and initial else input
        self.dtype = like.dtype
        if (reason := native.refusal(cell, like)) is not None:
            raise NotImplementedError(f"input can't be served: {reason}")
        self.arithmetic = arithmetic_of(self.dtype)
        base = cell.partition("+")[0]
        states, dtypes = 2 if base == "lstm" else 1, (self.dtype, self.arithmetic)
        check_forward(
            *(cell, gate_count(cell), states, input, initial, parameters, dtypes, lengths, reset),
            *(extra, masks, mask_names, batch_sizes),
        )
        steps, batch = steps_and_batch(input, batch_sizes)
        self._gates = gate_count(cell)
        self._hold(input, initial, parameters[: len(parameters) - len(extra)])
        check_memory(input=[input], initial=self.initial, parameters=self.weights[3:])
        if lengths is not None and bool((lengths == steps).all()):
            lengths = None
        self._is_packed = batch_sizes is not None
        if batch_sizes is not None:
            batch_sizes = None if int(batch_sizes[-1]) == batch else batch_sizes.clone()
        self.rows = other.rows if other is not None else Rows(steps, batch, lengths, batch_sizes)
        self.directions = directions
        self.reset = None if reset is None else reset.contiguous()
        self.reverse = reverse
        self._base = base
        self.layout = self._lay_out()

    def _lay_out(self) -> Any:
        """Make the native layout, which knows arrays by address only."""
        return kind(self.dtype)(
            *(native.CELLS[self._base], bool(self.reverse), torch.get_num_threads(), self.rows.steps, self.rows.batch),
            *(self.weights.hidden, self.weights.projected),
            *(address(t) for t in (self.rows.rows, self.rows.first_row, self.rows.order, self.reset)),
            *(self.rows.batch_sizes is not None, self.directions * self.width),
        )

    def _hold(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> None:
        self.like = initial[0] if self.reads_ids else input
        self.initial = [plain(s) for s in initial]
        self.weights_dtype = parameters[0].dtype
        self.weights = _read_weights(self._gates, parameters, self.reads_ids).to(self.arithmetic)

    def let_go(self) -> None:
        """Drop input, state and parameters; who takes part when, and the resets, stay."""
        del self.like, self.initial, self.weights, self.layout

    def take_up(self, input: Tensor, initial: list[Tensor], parameters: list[Tensor]) -> "Call":
        """Return the same request for tensors like those which it was made of."""
        call = object.__new__(Call)
        call.__dict__ |= self.__dict__
        call._hold(input, initial, parameters)
        call.layout = call._lay_out()
        return call

    def where_input_is(self, x: Tensor) -> tuple[int, int, int, int]:
        """Address, width and stride of packed rows, and address of packed ids; one of the two is there."""
        width = self.weights.weight_ih.shape[1]
        return (0, width, 0, x.data_ptr()) if self.reads_ids else (x.data_ptr(), width, x.stride(0), 0)

    def stretches(self, width: int) -> list[Stretch]:
        """Cut the steps into stretches whose gates fit the cache."""
        return list(self.rows.stretches(width, self.arithmetic.itemsize))

    def segments(self, width: int, every: int) -> list[list[Stretch]]:
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

    def with_c_before(self, kept: Tensor, segment: list[Stretch], c: Tensor) -> Tensor:
        """Return `kept` of a segment, in memory whose rows beside it hold the c before: (B, H), of each row of the step before."""
        step = segment[-1].end if self.reverse else segment[0].begin - 1
        if not 0 <= step < self.rows.steps:
            return kept
        count = self.rows.batch if self.rows.rows is None else int(self.rows.rows[step])
        before = c if self.rows.order is None else c[self.rows.order[:count]]
        both = new(kept, len(kept) + count, kept.shape[1])
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
            return new(self.like, self.rows.count, width)
        shape = (self.rows.steps, self.rows.batch, width)
        return new(self.like, *shape) if self.rows.lengths is None else new_zeros(self.like, *shape)


def both_directions(
    cell: str,
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> list[Call]:
    """Check and lay out both directions of a layer."""
    check_directions(reverse, initial, parameters)
    calls: list[Call] = []
    for states, weights in zip(shares(initial, 2), shares(parameters, 2), strict=True):
        given = (cell, input, states, weights, lengths, reset, bool(calls), batch_sizes)
        calls.append(Call(*given, other=calls[0] if calls else None, directions=2))
    return calls


def shares(tensors: Sequence[Any], count: int) -> list[Any]:
    """Cut a list of tensors in each direction's own."""
    if count == 1:
        return [tensors]
    own = len(tensors) // count
    return [tensors[first : first + own] for first in range(0, own * count, own)] if own else [[]] * count


def joined(lists: list[list[Tensor]]) -> list[Tensor]:
    """Put lists one after the other."""
    return list(chain.from_iterable(lists))


def check_saved(
    calls: list[Call],
    input: Tensor,
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: list[Tensor],
    widths: list[int],
    segments: list[Any] | None,
) -> None:
    """Check what a backward pass is given; with `segments`, `saved` are the states before each of them."""
    call, initial = calls[0], joined([each.initial for each in calls])
    shapes: list[tuple[int, ...]] = [(call.rows.count, width) for width in widths] * len(calls)
    if segments is not None:
        shapes = [(len(segments), *s.shape) for s in initial]
    dtype = None if segments is None else call.arithmetic
    check_backward(input, initial, grad_output, grad_final, output, saved, shapes, dtype, len(calls))


def check_memory(**tensors: Sequence[Tensor | None]) -> None:
    """Refuse tensors that only stand for others: a subclass's wrapper, torch's own way to say zero."""
    for name, group in tensors.items():
        for tensor in group:
            if tensor is not None and tensor.numel() and not tensor.data_ptr():
                raise TypeError(f"{name}: a {type(tensor).__name__} without memory of its own; expected a plain tensor")


def table_of(call: Call) -> Tensor:
    """Return W_ih x of each token id (V, G·H): the transposed weights, rounded as for the product with one-hot vectors."""
    weight = call.weights.weight_ih
    return weight.to(call.dtype).to(weight.dtype).t().contiguous()


def new_input_sum(call: Call) -> Tensor:
    """Return zeros to which the gradient of W_ih is added; token ids choose rows of its transpose."""
    gate_rows, columns = call.weights.weight_ih.shape
    shape = (columns, gate_rows) if call.reads_ids else (gate_rows, columns)
    return new_zeros(call.weights.weight_ih, *shape)


def as_weight(call: Call, sum: Tensor) -> Tensor:
    """Return what was added up in `new_input_sum` in the shape of W_ih: a gradient has its weight's layout."""
    if not call.reads_ids:
        return sum
    return sum.t().contiguous() if call.weights.weight_ih.is_contiguous() else sum.t()
