"""One direction of a request, laid out as the kernels read it.

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

from throughtime.kernels import native
from throughtime.kernels.native import address, addresses, arithmetic_of, contiguous, kind, memory_of, new, new_zeros
from throughtime.request import Direction, Request, check_batch_sizes, check_lengths
from throughtime.spec import Parameters

# Bytes of gates from one pass over them to the next. A backward pass takes sums and cuts segments by them, so its are fixed; what a
# forward pass has multiplied for all steps at once is to be in a core's own cache, its L2, when the steps read it.
_STRETCH = 4 << 20
_FORWARD_STRETCH = 512 << 10
_FORWARD_ROWS = 128  # at least, to which a product applies what it reads of the weights


def count_segments(request: Request, hidden: int) -> int:
    """Return how many states a forward pass saves with `recompute_every`; sizes may be symbolic."""
    larger: Any = torch.sym_max
    batch = request.initial[0].shape[0]  # a fake `batch_sizes` has no values to be asked for
    width = native.cell(request.spec).gradient_gates * hidden
    stretch = larger(1, _STRETCH // larger(1, batch * width * arithmetic_of(request.dtype).itemsize))
    stretches = larger(1, -(-request.steps // stretch))
    return -(-stretches // -(-request.recompute_every // stretch))


def steps_of_a_stretch(batch: int, width: int, element_size: int) -> int:
    """Return how many steps go in a stretch, whose gates, so wide, are to fit the cache."""
    return max(1, _STRETCH // max(1, batch * width * element_size))


def steps_of_a_forward_stretch(batch: int, width: int, element_size: int) -> int:
    """Return the same for a forward pass."""
    if torch.get_num_threads() > 1:  # which meet between stretches
        return steps_of_a_stretch(batch, width, element_size)
    fitting = _FORWARD_STRETCH // max(1, batch * width * element_size)
    return max(1, fitting, -(-_FORWARD_ROWS // max(1, batch)))


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

    @classmethod
    def of(cls, request: Request) -> "Rows":
        """Return those of a request, from copies that are checked anew: other threads may write to what is the caller's."""
        steps, batch, lengths, batch_sizes = request.steps, request.batch, request.lengths, request.batch_sizes
        if lengths is not None:
            lengths = lengths.clone(memory_format=torch.contiguous_format)
            check_lengths(lengths, steps)
            lengths = None if bool((lengths == steps).all()) else lengths
        if batch_sizes is not None:
            batch_sizes = batch_sizes.clone(memory_format=torch.contiguous_format)
            check_batch_sizes(batch_sizes, len(request.input))
            batch = request.initial[0].shape[0]
            if int(batch_sizes[0]) != batch:
                raise ValueError(f"batch_sizes[0] = {int(batch_sizes[0])}; expected {batch}, as the state has")
            batch_sizes = None if int(batch_sizes[-1]) == batch else batch_sizes
        return cls(steps, batch, lengths, batch_sizes)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.lengths is not None
        lengths = self.lengths
        sizes = self.batch, self.steps, self.steps, int(lengths.sum())
        found = order, rows, first_row, index = tuple(lengths.new_empty(size) for size in sizes)
        native.module.plan_rows(lengths.data_ptr(), self.batch, self.steps, *(tensor.data_ptr() for tensor in found))
        return order, rows, first_row, index

    @property
    def order(self) -> Tensor | None:
        """Column of the batch, for each rank (B,)."""
        return None if self.lengths is None else self._sorted[0]

    @property
    def rows(self) -> Tensor | None:
        """How many take part in each step (T,)."""
        return self.batch_sizes if self.lengths is None else self._sorted[1]

    @cached_property
    def first_row(self) -> Tensor | None:
        """Where a step's rows begin in packed arrays (T,)."""
        if self.batch_sizes is not None:
            return self.batch_sizes.cumsum(0) - self.batch_sizes
        return None if self.lengths is None else self._sorted[2]

    @property
    def index(self) -> Tensor:
        """Row of the padded (T · B, ·) array, for each row of the packed one."""
        return self._sorted[3]

    @cached_property
    def count(self) -> int:
        """Rows of a packed array: the sum of the lengths."""
        if self.batch_sizes is not None:
            return int(self.batch_sizes.sum())
        return self.steps * self.batch if self.lengths is None else len(self.index)

    @property
    def most(self) -> int:
        """Rows of a packed array, whatever the lengths are."""
        return self.count if self.lengths is None else self.steps * self.batch

    def compact(self, input: Tensor) -> Tensor:
        """(T, B, ·), or ids (T, B), to packed; what is packed stays so. Of ids it is a copy."""
        is_packed = input.dim() == (2 if input.is_floating_point() else 1)
        flat = input.resolve_neg() if is_packed else input.resolve_neg().flatten(0, 1)
        if self.lengths is not None:
            return torch.index_select(flat, 0, self.index, out=new(flat, self.count, *flat.shape[1:]))
        if not input.is_floating_point():
            return flat.clone(memory_format=torch.contiguous_format)
        return flat if flat.stride(-1) == 1 else flat.contiguous()  # the products step over rows, not within one

    def spread(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Packed to (T, B, ·), with zeros elsewhere, or to what is packed itself."""
        if self.lengths is None:
            return packed.view(shape)
        padded = new_zeros(packed, self.steps * self.batch, shape[-1])
        return padded.index_copy_(0, self.index, packed).view(shape)

    def stretches(self, steps: int) -> Iterator[Stretch]:
        """Cut the steps into stretches of so many."""
        ends = [*range(steps, self.steps, steps), self.steps]
        if self.first_row is None:
            last_rows = [end * self.batch for end in ends]
        else:
            last_rows = [*self.first_row[ends[:-1]].tolist(), self.count]
        yield from map(Stretch, [0, *ends], ends, [0, *last_rows], last_rows)


class Layout:
    """One direction of a request that has been checked.

    Attributes:
        spec: What the cell's name says.
        rows: Which rows take part in which step.
        like: A tensor of the request's dtype.
        initial: The state that it begins with, as it is read by address.
        weights: The parameters likewise, in the dtype of arithmetic.
        masks: The masks likewise, by name.
        cell: What the native side says of the cell.
        native: The native layout, which knows arrays by address only.
    """

    def __init__(self, request: Request, direction: Direction, rows: Rows) -> None:
        self.spec, self.rows, self.reverse = request.spec, rows, direction.reverse
        self.reads_ids, self.dtype, self.directions = request.reads_ids, request.dtype, len(request.directions)
        self.arithmetic, self.cell = arithmetic_of(self.dtype), native.cell(request.spec)
        self.reset = None if request.reset is None else request.reset.clone(memory_format=torch.contiguous_format)
        self._is_packed = request.batch_sizes is not None
        self._hold(request, direction)
        check_memory(input=[request.input], initial=self.initial, parameters=self.weights, masks=[*self.masks.values()])
        self._keep_memory()
        self.native = self._lay_out()

    def _hold(self, request: Request, direction: Direction) -> None:
        given = direction.parameters
        self.like, self.weights_dtype = request.like, given.weight_ih.dtype
        self.initial = [contiguous(s) for s in direction.initial]
        # Columns of a table may lie together: that is how token ids will read it.
        weight_ih = given.weight_ih.resolve_neg() if self.reads_ids else contiguous(given.weight_ih)
        weights = [weight_ih, *[None if p is None else contiguous(p) for p in given[1:]]]
        if self.weights_dtype != self.arithmetic:
            weights = [None if p is None else p.to(self.arithmetic) for p in weights]
        self.weights = Parameters(*weights)
        self.masks = {n: contiguous(m) for n, m in request.masks.there().items()} if self.spec.masks else {}
        self.hidden = given.weight_hh.shape[0] // self.spec.gates
        self.projected = 0 if given.weight_hr is None else given.weight_hr.shape[0]

    def _keep_memory(self) -> None:
        self._memory = memory_of(*self.initial, *self.weights.to_list(), *self.masks.values())

    def _lay_out(self) -> Any:
        rows = self.rows
        laid_out = kind(self.dtype)(
            cell=self.cell.number,
            gates=self.spec.gates,
            reverse=self.reverse,
            threads=torch.get_num_threads(),
            steps=rows.steps,
            batch=rows.batch,
            hidden=self.hidden,
            projected=self.projected,
            rows=address(rows.rows),
            first_row=address(rows.first_row),
            order=address(rows.order),
            reset=address(self.reset),
            is_packed=rows.batch_sizes is not None,
            output_stride=self.directions * self.width,
        )
        if self.spec.variants:
            laid_out.vary(**self._of_variants())
        return laid_out

    def _of_variants(self) -> dict[str, Any]:
        """Return where parameters and masks are that variants add, and shares that stand for masks."""
        weights = self.weights._asdict()
        own = {name: weights[name] for name in ("bias_ih", "bias_hh", *self.spec.variant_parameters)}
        shares = {n.replace("zoneout", "share"): m.item() for n, m in self.masks.items() if m.dim() == 0}
        return addresses(own) | addresses({n: m for n, m in self.masks.items() if m.dim()}) | shares

    def let_go(self) -> None:
        """Drop input, state, parameters and masks; who takes part when, and the resets, stay.

        The native layout goes too: one that lives in a graph when Python ends is called a leak by nanobind, on stderr.
        """
        del self.like, self.initial, self.weights, self.masks, self._memory, self.native

    def take_up(self, request: Request, direction: Direction) -> "Layout":
        """Return the same layout for tensors like those which it was made of."""
        layout = object.__new__(Layout)
        layout.__dict__ |= self.__dict__
        layout._hold(request, direction)
        layout._keep_memory()
        layout.native = layout._lay_out()
        return layout

    @property
    def width(self) -> int:
        """P, the width of h."""
        return self.projected or self.hidden

    @property
    def gates_width(self) -> int:
        """G · H."""
        return self.spec.gates * self.hidden

    def where_input_is(self, x: Tensor) -> tuple[int, int, int, int]:
        """Address, width and stride of packed rows, and address of packed ids; one of the two is there."""
        width = self.weights.weight_ih.shape[1]
        return (0, width, 0, x.data_ptr()) if self.reads_ids else (x.data_ptr(), width, x.stride(0), 0)

    def where_weights_are(self, weight_ih: Tensor | None) -> dict[str, int]:
        """Addresses of the weights that are packed for a pass, W_ih only where it meets rows."""
        weights = self.weights
        return {
            "weight_ih": address(weight_ih),
            "input": weights.weight_ih.shape[1],
            "weight_hh": weights.weight_hh.data_ptr(),
            "weight_hr": address(weights.weight_hr),
            "bias_ih": address(weights.bias_ih),
            "bias_hh": address(weights.bias_hh),
        }

    def new_saved(self, rows: int) -> list[Tensor]:
        """Make a place for what the backward pass needs, of so many packed rows."""
        wide = self.weights.weight_hh
        return [new(wide if it.is_wide else self.like, rows, it.width(self.hidden)) for it in self.cell.saved]

    def new_saved_in_graph(self) -> list[Tensor]:
        """Make it of a size that doesn't depend on the lengths; rows past the real ones are zeros."""
        saved = self.new_saved(self.rows.most)
        for tensor in saved:
            tensor[self.rows.count :].zero_()
        return saved

    def where_saved_is(self, saved: Sequence[Tensor]) -> dict[str, int]:
        """Addresses of what `new_saved` has made, by name; it may be empty."""
        return {it.name: tensor.data_ptr() for it, tensor in zip(self.cell.saved, saved, strict=False)}

    def forward_stretches(self) -> list[Stretch]:
        """Cut the steps into stretches for a forward pass, where it isn't one over segments."""
        steps = steps_of_a_forward_stretch(self.rows.batch, self.gates_width, self.arithmetic.itemsize)
        return list(self.rows.stretches(steps))

    def segments(self, every: int) -> list[list[Stretch]]:
        """Group the stretches of a backward pass such that each has `every` steps at least; 0 makes one segment of them all."""
        width = self.cell.gradient_gates * self.hidden
        steps = steps_of_a_stretch(self.rows.batch, width, self.arithmetic.itemsize)
        stretches = list(self.rows.stretches(steps))
        count = -(-every // max(1, stretches[0].end)) if every else len(stretches)
        return [stretches[first : first + count] for first in range(0, len(stretches), count)]

    def forward_order(self, parts: list[Any]) -> list[tuple[int, Any]]:
        """Number stretches or segments, in the order in which the forward pass runs through them."""
        return [*enumerate(parts)][:: -1 if self.reverse else 1]

    def backward_order(self, parts: list[Any]) -> list[tuple[int, Any]]:
        """Number them in the order of the backward pass."""
        return self.forward_order(parts)[::-1]

    def with_c_before(self, own_c: Tensor, segment: list[Stretch], c: Tensor) -> Tensor:
        """Return a place for a segment's c, in memory whose rows beside it hold the c before: (B, H), of each row of that step."""
        step = segment[-1].end if self.reverse else segment[0].begin - 1
        if not 0 <= step < self.rows.steps:
            return own_c
        count = self.rows.batch if self.rows.rows is None else int(self.rows.rows[step])
        before = c if self.rows.order is None else c[self.rows.order[:count]]
        both = new(own_c, len(own_c) + count, own_c.shape[1])
        beside, own = both.split([len(own_c), count])[::-1] if self.reverse else both.split([count, len(own_c)])
        beside.copy_(before[:count])
        return own

    def new_output(self) -> Tensor:
        """A place for the output; what lies past a row's end is zero, and the kernels don't write there."""
        width = self.directions * self.width
        if self._is_packed:
            return new(self.like, self.rows.count, width)
        shape = (self.rows.steps, self.rows.batch, width)
        return new(self.like, *shape) if self.rows.lengths is None else new_zeros(self.like, *shape)

    def table(self) -> Tensor:
        """Return W_ih x of each token id (V, G·H): the transposed weights, rounded as for the product with one-hot vectors."""
        weight = self.weights.weight_ih
        return weight.to(self.dtype).to(weight.dtype).t().contiguous()

    def new_input_sum(self) -> Tensor:
        """Return zeros to which the gradient of W_ih is added; token ids choose rows of its transpose."""
        gate_rows, columns = self.weights.weight_ih.shape
        shape = (columns, gate_rows) if self.reads_ids else (gate_rows, columns)
        return new_zeros(self.weights.weight_ih, *shape)

    def as_weight(self, sum: Tensor) -> Tensor:
        """Return what was added up in `new_input_sum` in the shape of W_ih: a gradient has its weight's layout."""
        if not self.reads_ids:
            return sum
        return sum.t().contiguous() if self.weights.weight_ih.is_contiguous() else sum.t()


def lay_out(request: Request) -> list[Layout]:
    """Lay out each direction of a request; they share their rows."""
    if request.lengths is not None or request.reset is not None or request.batch_sizes is not None:
        check_memory(lengths=[request.lengths], reset=[request.reset], batch_sizes=[request.batch_sizes])
    rows = Rows.of(request)
    return [Layout(request, direction, rows) for direction in request.directions]


def joined(lists: list[list[Tensor]]) -> list[Tensor]:
    """Put lists one after the other."""
    return list(chain.from_iterable(lists))


def expected_saved(
    layouts: list[Layout], saved: Sequence[Tensor], segments: list[Any] | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of what a forward pass saves: the states before each of `segments`, or a row for each real step.

    Of the latter there may also be as many as there could be.
    """
    first = layouts[0]
    if segments is not None:
        return [((len(segments), *s.shape), first.arithmetic) for layout in layouts for s in layout.initial]
    rows, hidden = first.rows, first.hidden
    is_whole = any(isinstance(s, Tensor) and s.dim() and s.shape[0] == rows.most for s in saved)
    count = rows.most if is_whole else rows.count
    own = [((count, it.width(hidden)), first.arithmetic if it.is_wide else first.dtype) for it in first.cell.saved]
    return own * len(layouts)


def check_memory(**tensors: Sequence[Tensor | None]) -> None:
    """Refuse tensors that only stand for others: a subclass's wrapper, torch's own way to say zero."""
    for name, group in tensors.items():
        for tensor in group:
            if tensor is not None and tensor.numel() and not tensor.data_ptr():
                raise TypeError(f"{name}: a {type(tensor).__name__} without memory of its own; expected a plain tensor")
