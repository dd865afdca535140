"""The native kernels of cells with variants: layer normalisation, peepholes, coupled gates, zoneout, recurrent dropout.

As `kernels.cpu`, with a time loop of their own (`csrc/variants.cpp`); float32 and float64. The equations stand in
`throughtime.cells`. Masks come in drawn, so the equations can be given the very same ones.

Kept for the backward pass, in floats per real step, besides input and output: the gates' values G·H; H more for an LSTM
and for a GRU with the reset gate after the product; and with layer normalisation 2 G·H and 4 or 6.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.arguments import check_tensor
from throughtime.kernels import native
from throughtime.kernels.cpu import Gradient, run_segments
from throughtime.kernels.native import kind, new, new_zeros, plain
from throughtime.kernels.request import (
    Call,
    Stretch,
    as_weight,
    check_memory,
    check_saved,
    count_segments,
    gate_count,
    new_input_sum,
    table_of,
)

_APART = 16  # rows of gradients away from powers of two, where reading down a column would meet the same few sets of the cache
_MASKS = ("zoneout_h", "zoneout_c", "recurrent_dropout")


class _Spec(NamedTuple):
    """What a cell's name says."""

    cell: str
    variants: frozenset[str]

    @property
    def extra(self) -> list[str]:
        """Names of the parameters beyond torch's, in their order."""
        names = ["weight_ch"] if "peepholes" in self.variants else []
        if self.is_normalised:
            names += ["gain_ih", "gain_hh", *(["gain_c", "shift_c"] if self.cell == "lstm" else [])]
        return names

    @property
    def is_normalised(self) -> bool:
        return "layer_norm" in self.variants

    @property
    def norms_width(self) -> int:
        """Mean and scale of each normalisation."""
        return 6 if self.cell in ("lstm", "gru_reset_before") else 4

    @property
    def keeps(self) -> bool:
        """Whether `kept` is needed."""
        return self.cell in ("lstm", "gru")


def _read(name: str) -> _Spec:
    cell, *variants = name.split("+")
    return _Spec(cell, frozenset(variants))


def saved_widths(name: str, hidden: int) -> list[int]:
    """Return the widths of what `forward` keeps; each has a row for every real step of every sequence."""
    spec, gates = _read(name), gate_count(name) * hidden
    return [gates, *([hidden] if spec.keeps else []), *([gates, gates, spec.norms_width] if spec.is_normalised else [])]


def segment_count(name: str, steps: int, batch: int, hidden: int, dtype: torch.dtype, every: int) -> int:
    """Return how many states `forward` keeps with `recompute_every`."""
    return count_segments(steps, batch, 2 * gate_count(name) * hidden, dtype, every)


def forward(
    cell: str,
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    keep: bool,
    masks: list[Tensor],
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run one layer in one direction.

    Args:
        cell: A name that `throughtime.cells.find` knows.
        input: As in `cpu.forward`; float32, float64 or token ids.
        initial: As in `cpu.forward`.
        parameters: As in `cpu.forward`; then those that the variants bring.
        lengths: As in `cpu.forward`.
        reset: As in `cpu.forward`.
        reverse: As in `cpu.forward`.
        keep: As in `cpu.forward`.
        masks: Those of `throughtime.cells.Masks` that the cell takes, of packed input in the order of its rows.
        batch_sizes: As in `cpu.forward`.
        recompute_every: As in `cpu.forward`.
    """
    request = _Request(cell, input, initial, parameters, lengths, reset, reverse, masks, batch_sizes)
    call, output = request.call, request.call.new_output()
    state = [s.clone(memory_format=torch.contiguous_format) for s in call.initial]
    loop = _ForwardLoop(request, call.rows.compact(input))
    if keep and recompute_every:
        segments = request.segments(recompute_every)
        (saved,) = run_segments([call], segments, [state], lambda parts: loop.run(parts[0], state, output))
    else:
        saved = loop.new_saved(call.rows.count) if keep else []
        loop.run(call.stretches(call.weights.gates * call.weights.hidden), state, output, saved)
    return output, state, saved


def backward(
    cell: str,
    grad_output: Tensor | None,
    grad_final: list[Tensor],
    input: Tensor,
    initial: list[Tensor],
    parameters: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    needs_input: bool,
    masks: list[Tensor],
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
) -> Gradient:
    """Backpropagate through time; the arguments are those of `forward`, and of `cpu.backward`."""
    request = _Request(cell, input, initial, parameters, lengths, reset, reverse, masks, batch_sizes)
    call, loop, segments = request.call, request.loop, request.segments(recompute_every)
    widths = saved_widths(cell, call.weights.hidden)
    kept = segments if recompute_every else None
    check_saved([call], input, grad_output, grad_final, output, saved, widths, kept)
    output, saved = plain(output), [plain(tensor) for tensor in saved]
    check_memory(output=[output], grad_output=[grad_output], grad_final=grad_final, saved=saved)
    grad_output = None if grad_output is None else plain(grad_output)
    grad_state = [g.clone(memory_format=torch.contiguous_format) for g in grad_final]
    grad_anew = [torch.zeros_like(g) for g in grad_state]
    request.set(
        ("grad_output", grad_output),
        *zip(("grad_h", "grad_c"), grad_state, strict=False),
        *zip(("grad_initial_h", "grad_initial_c"), grad_anew, strict=False),
    )
    x = call.rows.compact(input)
    sums = _Sums(request, x, needs_input and not call.reads_ids)
    work = _Workspace.of(request, max(s.last_row - s.first_row for segment in segments for s in segment))
    loop.grad_stride = work.grad_ih.stride(0)
    backward_weights = request.pack(transposed=False)
    again, states = _ForwardLoop(request, x) if recompute_every else None, saved
    for number, segment in call.backward_order(segments):
        if again is not None:
            saved = again.again(segment, [s[number] for s in states])
        loop.first_row = segment[0].first_row if again is not None else 0
        request.set(*backward_weights, *zip(request.saved_names, saved, strict=True), ("output", output))
        for _, stretch in call.backward_order(segment):
            loop.begin, loop.end, loop.first_grad_row = stretch.begin, stretch.end, stretch.first_row
            loop.backward()
            sums.add(stretch, work)
    grad_state = [a + b for a, b in zip(grad_state, grad_anew, strict=True)]
    grad_input = None if sums.input is None else call.rows.spread(sums.input, input.shape)
    return Gradient(grad_input, grad_state, sums.to_list())


class _ForwardLoop:
    """The forward pass over any of a call's steps, its weights packed."""

    def __init__(self, request: "_Request", x: Tensor) -> None:
        self.request, self.x = request, x
        self.product = _input_product(request.call)
        self.weights = request.pack(transposed=True)

    def new_saved(self, rows: int) -> list[Tensor]:
        """Make a place for what the backward pass needs, of so many packed rows."""
        call = self.request.call
        widths = saved_widths(self.request.name, call.weights.hidden)
        return [new(call.like, rows, width) for width in widths]

    def run(
        self,
        stretches: list[Stretch],
        state: list[Tensor],
        output: Tensor | None,
        saved: Sequence[Tensor] = (),
        first_row: int = 0,
    ) -> None:
        """Carry `state` over some stretches, writing to `output`, and to `saved`, which begins at a packed row."""
        call, loop = self.request.call, self.request.loop
        arrays = dict(zip(self.request.saved_names, saved, strict=True)) if saved else {}
        width, longest = call.weights.gates * call.weights.hidden, max(s.last_row - s.first_row for s in stretches)
        gates = arrays.get("gates", new(call.like, longest, width) if not saved else None)
        w = arrays.get("x", gates)  # W_ih x
        if self.request.spec.is_normalised and not saved:
            w = new(call.like, longest, width)
        assert w is not None
        nothing = dict.fromkeys(("kept", "u", "norms"))
        self.request.set(*self.weights, *{**nothing, **arrays, "gates": gates, "x": w, "output": output}.items())
        self.request.set(*zip("hc", state, strict=False))
        for _, stretch in call.forward_order(stretches):
            base = first_row if saved else stretch.first_row
            rows = slice(stretch.first_row - base, stretch.last_row - base)
            self.product.write(self.x[stretch.first_row : stretch.last_row], w[rows])
            loop.begin, loop.end, loop.first_row = stretch.begin, stretch.end, base
            loop.forward()

    def again(self, segment: list[Stretch], before: list[Tensor]) -> list[Tensor]:
        """Compute what the backward pass needs of a segment, from the state before it."""
        saved = self.new_saved(segment[-1].last_row - segment[0].first_row)
        if self.request.spec.cell == "lstm":
            saved[1] = self.request.call.with_c_before(saved[1], segment, before[1])
        self.run(segment, [s.clone() for s in before], None, saved, segment[0].first_row)
        return saved


class _Request:
    """A call, checked, and the native loop that will serve it."""

    def __init__(
        self,
        cell: str,
        input: Tensor,
        initial: list[Tensor],
        parameters: list[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
        masks: list[Tensor],
        batch_sizes: Tensor | None,
    ) -> None:
        self.name, self.spec = cell, _read(cell)
        spec = self.spec
        count, names = len(parameters) - len(spec.extra), [name for name in _MASKS if name in spec.variants]
        self.call = call = Call(
            *(cell, input, initial, parameters, lengths, reset, reverse),
            *(batch_sizes, spec.extra, masks, names),
        )
        self.extra = {n: plain(t) for n, t in zip(spec.extra, parameters[count:], strict=True)}
        self.masks = {n: plain(t) for n, t in zip(names, masks, strict=True)}
        check_memory(parameters=[*self.extra.values()], masks=[*self.masks.values()])
        self._check()
        variant = native.module.VariantF32 if call.dtype == torch.float32 else native.module.VariantF64
        self.loop: Any = variant(call.layout)
        self.loop.is_coupled = "coupled" in spec.variants
        self._held: dict[str, Tensor | None] = {}  # what the loop knows by address only
        self.set(("bias_ih", call.weights.bias_ih), ("bias_hh", call.weights.bias_hh), *self.extra.items())
        self.set(*zip(("initial_h", "initial_c"), call.initial, strict=False))
        for name, mask in self.masks.items():
            if mask.dim() == 0:
                setattr(self.loop, name.replace("zoneout", "kept"), mask.item())
            else:
                self.set((name, mask))

    @property
    def saved_names(self) -> list[str]:
        """The loop's names of what the forward pass keeps, in the order of `saved_widths`."""
        return ["gates", *["kept"] * self.spec.keeps, *(["x", "u", "norms"] if self.spec.is_normalised else [])]

    def segments(self, every: int) -> list[list[Stretch]]:
        """The stretches of the backward pass, as `Call.segments` groups them."""
        return self.call.segments(2 * self.call.weights.gates * self.call.weights.hidden, every)

    def set(self, *fields: tuple[str, Tensor | None]) -> None:
        """Tell the loop where arrays are."""
        for name, tensor in fields:
            self._held[name] = tensor
            setattr(self.loop, name, 0 if tensor is None else tensor.data_ptr())

    def pack(self, transposed: bool) -> list[tuple[str, Tensor]]:
        """Return W_hh, (reset before) its part for n, and W_hr, packed for the forward loop if transposed, else backward."""
        weights = self.call.weights
        cut = 2 * weights.hidden if self.spec.cell == "gru_reset_before" else len(weights.weight_hh)
        factors = {"weight_hh": weights.weight_hh[:cut], "weight_n": weights.weight_hh[cut:]}
        if weights.weight_hr is not None:
            factors["weight_hr"] = weights.weight_hr
        return [(n, _RowProduct(f.dtype, f, transposed).packed) for n, f in factors.items() if len(f)]

    def _check(self) -> None:
        """Check of the masks what `Call` leaves open: their dtypes."""
        for name, mask in self.masks.items():
            dtype = torch.bool if name.startswith("zoneout") and mask.dim() else self.call.dtype
            check_tensor(name, mask, tuple(mask.shape), dtype, self.call.like.device)


class _Workspace(NamedTuple):
    """What one stretch of the backward loop yields for the products after it, in packed rows.

    Attributes:
        grad_ih: Gradient of W_ih x, (·, G·H).
        grad_hh: Gradient of W_hh h; the same tensor where they are the same.
        h_in: h as it enters W_hh, (·, P).
        extra: (·, H), r ⊙ h of a GRU with the reset gate before the product, m of a projected LSTM.
        grad_hidden: ∂h of a projected LSTM (·, P).
    """

    grad_ih: Tensor
    grad_hh: Tensor
    h_in: Tensor
    extra: Tensor | None
    grad_hidden: Tensor | None

    @classmethod
    def of(cls, request: _Request, rows: int) -> "_Workspace":
        """Make it, and tell the loop where it is."""
        call, spec = request.call, request.spec
        hidden, projected = call.weights.hidden, call.weights.projected
        width = call.weights.gates * hidden

        def part(columns: int, apart: int = 0) -> Tensor:
            return new(call.like, rows, columns + apart)[:, :columns]

        grad_ih = part(width, _APART)
        grad_hh = part(width, _APART) if spec.is_normalised or spec.cell == "gru" else grad_ih
        extra = part(hidden) if projected or spec.cell == "gru_reset_before" else None
        work = cls(grad_ih, grad_hh, part(call.width), extra, part(projected) if projected else None)
        request.set(*work._asdict().items())
        return work


class _Sums:
    """The gradients that are sums over all steps."""

    def __init__(self, request: _Request, x: Tensor, needs_input: bool) -> None:
        call, loop = request.call, request.loop
        self.request, self.weights, self.x = request, call.weights, x
        self.input = new(self.x, *self.x.shape) if needs_input else None
        self.weight_ih = new_input_sum(call)
        self.weight_hh = new_zeros(self.weights.weight_hh, *self.weights.weight_hh.shape)
        weight_hr = self.weights.weight_hr
        self.weight_hr = None if weight_hr is None else new_zeros(weight_hr, *weight_hr.shape)
        self.through_ih = _RowProduct(call.dtype, self.weights.weight_ih) if needs_input else None
        loop.sum_stride = (self.weights.hidden + 15) // 16 * 16
        self.by_unit = new_zeros(call.like, loop.most_groups, loop.sum_rows, loop.sum_stride)
        request.set(("sums", self.by_unit))

    def add(self, stretch: Stretch, work: _Workspace) -> None:
        """Add what a stretch of the backward loop has yielded; sums by unit it has taken itself."""
        first, last = stretch.first_row, stretch.last_row
        rows = last - first
        if self.request.call.reads_ids:
            _add_by_id(self.weight_ih, work.grad_ih[:rows], self.x[first:last])
        else:
            _add_outer(self.weight_ih, work.grad_ih[:rows], self.x[first:last])
        if self.through_ih is not None and self.input is not None:
            self.through_ih.write(work.grad_ih[:rows], self.input[first:last])
        cut = 2 * self.weights.hidden if self.request.spec.cell == "gru_reset_before" else len(self.weight_hh)
        _add_outer(self.weight_hh[:cut], work.grad_hh[:rows, :cut], work.h_in[:rows])
        if work.extra is not None and work.grad_hidden is None:
            _add_outer(self.weight_hh[cut:], work.grad_hh[:rows, cut:], work.extra[:rows])
        elif work.extra is not None and work.grad_hidden is not None and self.weight_hr is not None:
            _add_outer(self.weight_hr, work.grad_hidden[:rows], work.extra[:rows])

    def to_list(self) -> list[Tensor]:
        """Gradients of the parameters, in their order."""
        gates, spec = self.weights.gates, self.request.spec
        total = self.by_unit.sum(0)[:, : self.weights.hidden]
        of_gates, da_n_r, gain_ih, gain_hh, of_c, weight_ch = total.split([gates, 1, gates, gates, 2, 3])
        tensors = [as_weight(self.request.call, self.weight_ih), self.weight_hh]
        if self.weights.bias_ih is not None:
            bias_hh = torch.cat([of_gates[:2], da_n_r]) if spec.cell == "gru" else of_gates
            tensors += [_vector(of_gates), _vector(bias_hh)]
        if self.weight_hr is not None:
            tensors.append(self.weight_hr)
        extra = {
            "weight_ch": weight_ch[: gates - 1],
            "gain_ih": gain_ih,
            "gain_hh": gain_hh,
            "gain_c": of_c[0],
            "shift_c": of_c[1],
        }
        return [*tensors, *(_vector(extra[name]) for name in spec.extra)]


def _vector(rows: Tensor) -> Tensor:
    return rows.reshape(-1).clone()


class _RowProduct:
    """rows · weight, or rows · weightᵀ, with the weight packed once, as a factor for rows of the given dtype."""

    def __init__(self, dtype: torch.dtype, weight: Tensor, transposed: bool = False) -> None:
        depth, self.columns = weight.shape[::-1] if transposed else weight.shape
        column_stride, depth_stride = weight.stride() if transposed else weight.stride()[::-1]
        self.packed = new(weight.new_empty(0, dtype=dtype), kind(dtype).columns_size(self.columns, depth))
        kind(dtype).pack_columns(
            *(self.columns, depth, weight.data_ptr(), column_stride, depth_stride, self.packed.data_ptr()),
            torch.get_num_threads(),
        )

    def write(self, rows: Tensor, out: Tensor) -> None:
        """Write the product of `rows` (·, depth) to `out` (·, columns)."""
        kind(rows.dtype).multiply_rows(
            *(*rows.shape, self.columns, rows.data_ptr(), rows.stride(0), self.packed.data_ptr(), out.data_ptr()),
            *(out.stride(0), torch.get_num_threads()),
        )


class _TableRows:
    """W_ih x for token ids: rows of a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def write(self, rows: Tensor, out: Tensor) -> None:
        """Write the rows of the ids `rows` (·) to `out` (·, columns)."""
        torch.index_select(self.table, 0, rows, out=out)


def _input_product(call: Call) -> _RowProduct | _TableRows:
    """Return what makes W_ih x of a call's input."""
    if call.reads_ids:
        return _TableRows(table_of(call))
    return _RowProduct(call.dtype, call.weights.weight_ih, transposed=True)


def _add_by_id(table: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Add each of `rows` to the row of `table` that its id names."""
    kind(rows.dtype).add_by_id(
        *(*rows.shape, rows.data_ptr(), rows.stride(0), ids.data_ptr(), table.data_ptr()),
        torch.get_num_threads(),
    )


def _add_outer(sum: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ · right to `sum`."""
    kind(left.dtype).add_outer(
        *(*left.shape, right.shape[1], left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0)),
        *(sum.data_ptr(), torch.get_num_threads()),
    )
