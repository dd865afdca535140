"""The native kernels of cells with variants: layer normalisation, peepholes, coupled gates, zoneout, recurrent dropout.

As `kernels.plain`, with a time loop of their own (`csrc/variants.cpp`); float32 and float64. The equations stand in
`throughtime.cells`. Masks come in drawn, so the equations can be given the very same ones.

Saved for the backward pass, in floats per real step, besides input and output: the gates' values G·H; H more for an LSTM
and for a GRU with the reset gate after the product; and with layer normalisation 2 G·H and 4 or 6.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.kernels import native
from throughtime.kernels.layout import Layout, Stretch, check_memory, count_segments, expected_saved, lay_out
from throughtime.kernels.native import contiguous, kind, new, new_zeros
from throughtime.kernels.plain import run_segments
from throughtime.request import Gradient, Request, Result, check_backward
from throughtime.spec import Spec

_APART = 16  # rows of gradients away from powers of two, where reading down a column would meet the same few sets of the cache


def saved_widths(spec: Spec, hidden: int) -> list[int]:
    """Return the widths of what `forward` saves; each has a row for every real step of every sequence."""
    gates = spec.gates * hidden
    norms = 6 if spec.base in ("lstm", "gru_reset_before") else 4  # mean and scale of each normalisation
    return [gates, *[hidden] * _has_kept(spec), *([gates, gates, norms] if spec.is_normalised else [])]


def _has_kept(spec: Spec) -> bool:
    """Whether the loop's array `kept` is there: c of an LSTM, U_n h of a GRU with the reset gate after the product."""
    return spec.base in ("lstm", "gru")


def segment_count(request: Request, hidden: int) -> int:
    """Return how many states `forward` saves with `recompute_every`; sizes may be symbolic."""
    width = 2 * request.spec.gates * hidden
    batch = request.initial[0].shape[0]  # a fake `batch_sizes` has no values to be asked for
    return count_segments(request.steps, batch, width, request.dtype, request.recompute_every)


def forward(request: Request, keep: bool) -> Result:
    """Compute a layer in one direction; `keep` says that a backward pass will follow."""
    variant = _Variant(request)
    layout, output = variant.layout, variant.layout.new_output()
    state = [s.clone(memory_format=torch.contiguous_format) for s in layout.initial]
    loop = _ForwardLoop(variant, layout.rows.compact(request.input))
    if keep and request.recompute_every:
        segments = variant.segments(request.recompute_every)
        (saved,) = run_segments([layout], segments, [state], lambda parts: loop.run(parts[0], state, output))
    else:
        saved = loop.new_saved(layout.rows.count) if keep else []
        loop.run(layout.stretches(layout.gates_width), state, output, saved)
    return Result(output, state, saved)


def backward(
    request: Request,
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    needs_input: bool,
) -> Gradient:
    """Backpropagate through time; a gradient that is `None` is zero."""
    variant = _Variant(request)
    layout, loop, segments = variant.layout, variant.loop, variant.segments(request.recompute_every)
    widths = saved_widths(layout.spec, layout.hidden)
    expected = expected_saved([layout], widths, segments if request.recompute_every else None)
    check_backward(request, grad_output, grad_final, output, saved, expected)
    output, saved = contiguous(output), [contiguous(tensor) for tensor in saved]
    check_memory(output=[output], grad_output=[grad_output], grad_final=grad_final, saved=saved)
    grad_output = None if grad_output is None else contiguous(grad_output)
    grad_state = [
        torch.zeros_like(s) if g is None else g.clone(memory_format=torch.contiguous_format)
        for g, s in zip(grad_final, layout.initial, strict=True)
    ]
    grad_anew = [torch.zeros_like(g) for g in grad_state]
    variant.set(
        ("grad_output", grad_output),
        *zip(("grad_h", "grad_c"), grad_state, strict=False),
        *zip(("grad_initial_h", "grad_initial_c"), grad_anew, strict=False),
    )
    x = layout.rows.compact(request.input)
    sums = _Sums(variant, x, needs_input and not layout.reads_ids)
    work = _Workspace.of(variant, max(s.last_row - s.first_row for segment in segments for s in segment))
    loop.grad_stride = work.grad_ih.stride(0)
    backward_weights = variant.pack(transposed=False)
    again, states = _ForwardLoop(variant, x) if request.recompute_every else None, saved
    for number, segment in layout.backward_order(segments):
        if again is not None:
            saved = again.again(segment, [s[number] for s in states])
        loop.first_row = segment[0].first_row if again is not None else 0
        variant.set(*backward_weights, *zip(variant.saved_names, saved, strict=True), ("output", output))
        for _, stretch in layout.backward_order(segment):
            loop.begin, loop.end, loop.first_grad_row = stretch.begin, stretch.end, stretch.first_row
            loop.backward()
            sums.add(stretch, work)
    grad_state = [a + b for a, b in zip(grad_state, grad_anew, strict=True)]
    grad_input = None if sums.input is None else layout.rows.spread(sums.input, request.input.shape)
    return Gradient(grad_input, grad_state, sums.to_list())


class _ForwardLoop:
    """The forward pass over any of a layout's steps, its weights packed."""

    def __init__(self, variant: "_Variant", x: Tensor) -> None:
        self.variant, self.x = variant, x
        self.product = _input_product(variant.layout)
        self.weights = variant.pack(transposed=True)

    def new_saved(self, rows: int) -> list[Tensor]:
        """Make a place for what the backward pass needs, of so many packed rows."""
        layout = self.variant.layout
        return [new(layout.like, rows, width) for width in saved_widths(layout.spec, layout.hidden)]

    def run(
        self,
        stretches: list[Stretch],
        state: list[Tensor],
        output: Tensor | None,
        saved: Sequence[Tensor] = (),
        first_row: int = 0,
    ) -> None:
        """Carry `state` over some stretches, writing to `output`, and to `saved`, which begins at a packed row."""
        layout, loop = self.variant.layout, self.variant.loop
        arrays = dict(zip(self.variant.saved_names, saved, strict=True)) if saved else {}
        width, longest = layout.gates_width, max(s.last_row - s.first_row for s in stretches)
        gates = arrays.get("gates", new(layout.like, longest, width) if not saved else None)
        w = arrays.get("x", gates)  # W_ih x
        if layout.spec.is_normalised and not saved:
            w = new(layout.like, longest, width)
        assert w is not None
        nothing = dict.fromkeys(("kept", "u", "norms"))
        self.variant.set(*self.weights, *{**nothing, **arrays, "gates": gates, "x": w, "output": output}.items())
        self.variant.set(*zip("hc", state, strict=False))
        for _, stretch in layout.forward_order(stretches):
            base = first_row if saved else stretch.first_row
            rows = slice(stretch.first_row - base, stretch.last_row - base)
            self.product.write(self.x[stretch.first_row : stretch.last_row], w[rows])
            loop.begin, loop.end, loop.first_row = stretch.begin, stretch.end, base
            loop.forward()

    def again(self, segment: list[Stretch], before: list[Tensor]) -> list[Tensor]:
        """Compute what the backward pass needs of a segment, from the state before it."""
        layout = self.variant.layout
        saved = self.new_saved(segment[-1].last_row - segment[0].first_row)
        if layout.spec.base == "lstm":
            saved[1] = layout.with_c_before(saved[1], segment, before[1])
        self.run(segment, [s.clone() for s in before], None, saved, segment[0].first_row)
        return saved


class _Variant:
    """A request that has been checked, laid out, and the native loop that will serve it."""

    def __init__(self, request: Request) -> None:
        (self.layout,) = lay_out(request)
        masks = {n: contiguous(m) for n, m in request.masks._asdict().items() if m is not None}
        check_memory(masks=[*masks.values()])
        dtype, weights = self.layout.dtype, self.layout.weights._asdict()
        variant = native.module.VariantF32 if dtype == torch.float32 else native.module.VariantF64
        self.loop: Any = variant(self.layout.native)
        self.loop.is_coupled = request.spec.is_coupled
        self._held: dict[str, Tensor | None] = {}  # what the loop knows by address only
        self.set(*((name, weights[name]) for name in ("bias_ih", "bias_hh", *request.spec.variant_parameters)))
        self.set(*zip(("initial_h", "initial_c"), self.layout.initial, strict=False))
        for name, mask in masks.items():
            if mask.dim() == 0:
                setattr(self.loop, name.replace("zoneout", "kept"), mask.item())
            else:
                self.set((name, mask))

    @property
    def saved_names(self) -> list[str]:
        """The loop's names of what the forward pass saves, in the order of `saved_widths`."""
        spec = self.layout.spec
        return ["gates", *["kept"] * _has_kept(spec), *(["x", "u", "norms"] if spec.is_normalised else [])]

    def segments(self, every: int) -> list[list[Stretch]]:
        """The stretches of the backward pass, as `Layout.segments` groups them."""
        return self.layout.segments(2 * self.layout.gates_width, every)

    def set(self, *fields: tuple[str, Tensor | None]) -> None:
        """Tell the loop where arrays are."""
        for name, tensor in fields:
            self._held[name] = tensor
            setattr(self.loop, name, 0 if tensor is None else tensor.data_ptr())

    def pack(self, transposed: bool) -> list[tuple[str, Tensor]]:
        """Return W_hh, (reset before) its part for n, and W_hr, packed for the forward loop if transposed, else backward."""
        weights, cut = self.layout.weights, self.cut
        factors = {"weight_hh": weights.weight_hh[:cut], "weight_n": weights.weight_hh[cut:]}
        if weights.weight_hr is not None:
            factors["weight_hr"] = weights.weight_hr
        return [(n, _RowProduct(f.dtype, f, transposed).packed) for n, f in factors.items() if len(f)]

    @property
    def cut(self) -> int:
        """Where the rows of W_hh end that meet h itself: those after it meet r ⊙ h."""
        is_reset_before = self.layout.spec.base == "gru_reset_before"
        return 2 * self.layout.hidden if is_reset_before else self.layout.gates_width


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
    def of(cls, variant: _Variant, rows: int) -> "_Workspace":
        """Make it, and tell the loop where it is."""
        layout, spec = variant.layout, variant.layout.spec
        hidden, projected, width = layout.hidden, layout.projected, layout.gates_width

        def part(columns: int, apart: int = 0) -> Tensor:
            return new(layout.like, rows, columns + apart)[:, :columns]

        grad_ih = part(width, _APART)
        grad_hh = part(width, _APART) if spec.is_normalised or spec.base == "gru" else grad_ih
        extra = part(hidden) if projected or spec.base == "gru_reset_before" else None
        work = cls(grad_ih, grad_hh, part(layout.width), extra, part(projected) if projected else None)
        variant.set(*work._asdict().items())
        return work


class _Sums:
    """The gradients that are sums over all steps."""

    def __init__(self, variant: _Variant, x: Tensor, needs_input: bool) -> None:
        layout, loop = variant.layout, variant.loop
        self.layout, self.cut, self.weights, self.x = layout, variant.cut, layout.weights, x
        self.input = new(self.x, *self.x.shape) if needs_input else None
        self.weight_ih = layout.new_input_sum()
        self.weight_hh = new_zeros(self.weights.weight_hh, *self.weights.weight_hh.shape)
        weight_hr = self.weights.weight_hr
        self.weight_hr = None if weight_hr is None else new_zeros(weight_hr, *weight_hr.shape)
        self.through_ih = _RowProduct(layout.dtype, self.weights.weight_ih) if needs_input else None
        loop.sum_stride = (layout.hidden + 15) // 16 * 16
        self.by_unit = new_zeros(layout.like, loop.most_groups, loop.sum_rows, loop.sum_stride)
        variant.set(("sums", self.by_unit))

    def add(self, stretch: Stretch, work: _Workspace) -> None:
        """Add what a stretch of the backward loop has yielded; sums by unit it has taken itself."""
        first, last = stretch.first_row, stretch.last_row
        rows = last - first
        if self.layout.reads_ids:
            _add_by_id(self.weight_ih, work.grad_ih[:rows], self.x[first:last])
        else:
            _add_outer(self.weight_ih, work.grad_ih[:rows], self.x[first:last])
        if self.through_ih is not None and self.input is not None:
            self.through_ih.write(work.grad_ih[:rows], self.input[first:last])
        cut = self.cut
        _add_outer(self.weight_hh[:cut], work.grad_hh[:rows, :cut], work.h_in[:rows])
        if work.extra is not None and work.grad_hidden is None:
            _add_outer(self.weight_hh[cut:], work.grad_hh[:rows, cut:], work.extra[:rows])
        elif work.extra is not None and work.grad_hidden is not None and self.weight_hr is not None:
            _add_outer(self.weight_hr, work.grad_hidden[:rows], work.extra[:rows])

    def to_list(self) -> list[Tensor]:
        """Gradients of the parameters, in their order."""
        spec = self.layout.spec
        gates = spec.gates
        total = self.by_unit.sum(0)[:, : self.layout.hidden]
        of_gates, da_n_r, gain_ih, gain_hh, of_c, weight_ch = total.split([gates, 1, gates, gates, 2, 3])
        tensors = [self.layout.as_weight(self.weight_ih), self.weight_hh]
        if self.weights.bias_ih is not None:
            bias_hh = torch.cat([of_gates[:2], da_n_r]) if spec.base == "gru" else of_gates
            tensors += [_vector(of_gates), _vector(bias_hh)]
        if self.weight_hr is not None:
            tensors.append(self.weight_hr)
        by_name = {
            "weight_ch": weight_ch[: gates - 1],
            "gain_ih": gain_ih,
            "gain_hh": gain_hh,
            "gain_c": of_c[0],
            "shift_c": of_c[1],
        }
        return [*tensors, *(_vector(by_name[name]) for name in spec.variant_parameters)]


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


def _input_product(layout: Layout) -> _RowProduct | _TableRows:
    """Return what makes W_ih x of the input."""
    if layout.reads_ids:
        return _TableRows(layout.table())
    return _RowProduct(layout.dtype, layout.weights.weight_ih, transposed=True)


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
