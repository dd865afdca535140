"""Requests laid out for the Triton kernels: what is one product for all steps is torch's, and the time loop is theirs."""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]  not everywhere
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn.functional import one_hot

from throughtime.kernels.triton.backward import backward_loop
from throughtime.kernels.triton.exchange import INTEGERS, as_set, unset
from throughtime.kernels.triton.forward import forward_loop
from throughtime.request import Gradient, Request, Result, check_backward, split
from throughtime.spec import Spec

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
EPSILON = 1e-5
_OTHER_SHARED = 19456  # bytes of shared memory for what isn't a product's factor
_SMALL_VOCABULARY = 1024  # up to here ∂W_ih of token ids is a product with one-hot vectors


def divided_up(number: int, size: int) -> int:
    """Return how many pieces of a size cover a number."""
    return -(-number // size)


class Tiling(NamedTuple):
    """How a time loop is cut.

    Attributes:
        rows: Of a program.
        units: Of a program.
        chunk: How many words, the integers that are exchanged, a product goes deep at once.
        warps: Of a program.
        groups: Groups of rows in a launch.
    """

    rows: int
    units: int
    chunk: int
    warps: int
    groups: int

    def chunks(self, width: int) -> int:
        """Return how many chunks a row of words has."""
        return divided_up(width, self.chunk)

    def pieces(self, columns: int, is_exact: bool) -> int:
        """Return in how many pieces a chunk is cut among the warps.

        One where matrix instructions can give each warp columns of its own; otherwise one for each warp, as long as a piece is deep
        enough for such an instruction.
        """
        return 1 if columns >= 8 * self.warps and not is_exact else min(self.warps, self.chunk // 16)


def programs_at_once(device: torch.device) -> int:
    """Return how many programs surely run at the same time: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a program may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448


def _chunk(width: int, largest: int) -> int:
    """Return the power of two of which at most eight cover a width with the least left over, or 0: products are unrolled."""
    sizes = [size for size in (16, 32, 64, 128, 256, 512) if size <= largest and 8 * size >= width]
    return min(sizes, key=lambda size: (divided_up(width, size) * size, -size)) if sizes else 0


@functools.lru_cache
def tiling(
    width: int, hidden: int, columns: int, batch: int, ways: int, word: int, programs: int, shared: int
) -> Tiling | None:
    """Choose how a time loop is cut, or return `None` where a multiprocessor can't hold its part.

    Args:
        width: Words of a row that is multiplied.
        hidden: H.
        columns: How many columns of a product a unit has.
        batch: B.
        ways: Directions.
        word: Bytes of a word.
        programs: How many run at once.
        shared: Bytes of shared memory that a program may take.
    """
    best: tuple[float, Tiling] | None = None
    for rows in (16, 32, 64):
        if rows > 16 and rows >= 2 * batch:
            break
        # A thread keeps its part of a row in registers until all of it has arrived, and has an element of each tile of its own.
        warps = 4 if rows * width <= 96 * 128 else 8
        chunk = _chunk(width, 64 * warps)
        if not chunk:
            continue
        padded = divided_up(width, chunk) * chunk
        warps = min(warps, rows * chunk // 32)
        for units in (8, 16, 32, 64):
            parts, groups = divided_up(hidden, units), divided_up(batch, rows)
            at_once = programs // (parts * ways)
            tile, weights, loaded = rows * chunk * word, padded * units * columns * word, rows * padded * word
            if at_once < 1 or rows * padded > 160 * 32 * warps or tile + weights > shared - _OTHER_SHARED:
                continue
            # A step waits for the L2 cache, loads its rows at some 60 bytes a cycle, and multiplies them.
            cost = 2000 + loaded / 60 + rows / 16 * units * columns * padded / 2048
            cost *= divided_up(groups, at_once)
            if best is None or cost < best[0]:
                best = cost, Tiling(rows, units, chunk, warps, min(groups, at_once))
    return None if best is None else best[1]


def holds_halves(dtype: torch.dtype, hidden: int) -> bool:
    """Whether numbers are exchanged two to a word."""
    return dtype != torch.float32 and hidden % 2 == 0


def tilings(request: Request, batch: int | None = None) -> tuple[Tiling, Tiling] | None:
    """Return how both passes over a request, of `batch` rows or of its own, are cut; or `None` where they can't be."""
    hidden, gates, ways = (
        request.directions[0].parameters.weight_hh.shape[1],
        request.spec.gates,
        len(request.directions),
    )
    rows, numbers = max(request.batch if batch is None else batch, 1), 1 + holds_halves(request.dtype, hidden)
    device = request.input.device
    rest = rows, ways, request.dtype.itemsize * numbers, programs_at_once(device), shared_memory(device)
    is_before, width = request.spec.base == "gru_reset_before", hidden // numbers
    choose = (
        tiling.__wrapped__ if torch.compiler.is_compiling() else tiling
    )  # Dynamo warns of a cache that it goes through
    forward = choose(width, hidden, (5 if is_before else 4) if gates > 1 else 1, *rest)
    backward = choose((2 if is_before else gates) * width, hidden, 2 if is_before else 1, *rest)
    return None if forward is None or backward is None else (forward, backward)


def fits(request: Request) -> bool:
    """Whether each multiprocessor can hold its part; how many rows there are doesn't matter, since they can be taken in turn."""
    return tilings(request, 1) is not None


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products of float32 may not be rounded to TF32: torch.nn's layers on a GPU ask this setting."""
    return dtype != torch.float32 or not torch.backends.cudnn.allow_tf32


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a @ b with sums in float32, as float32 or rounded once."""
    if a.dtype == dtype:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = not is_exact(a.dtype)
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


def slots(said: Spec) -> int:
    """Return how many numbers of each unit a step keeps, besides an LSTM's c: its gates; a GRU's u; what normalisation made."""
    return said.gates + (said.base == "gru") + said.gates * said.is_normalised


class Plan:
    """A request laid out for both passes."""

    def __init__(self, request: Request) -> None:
        """Lay out a request that has been checked."""
        said, device = request.spec, request.input.device
        first = request.directions[0]
        self.request, self.dtype, self.device = request, request.dtype, device
        self.ways, self.gates = len(request.directions), said.gates
        self.batch, self.steps = request.batch, request.steps
        self.hidden = first.initial[0].shape[1]
        self.places = request.input.shape[0] if request.batch_sizes is not None else self.steps * self.batch
        self.is_normalised, self.has_peepholes = said.is_normalised, "peepholes" in said.variants
        self.holds_halves = holds_halves(self.dtype, self.hidden)
        self.width = self.hidden // (1 + self.holds_halves)
        self.has_bias = first.parameters.bias_ih is not None
        self.order, self.lengths, self.offsets = self._rows()
        self.active = self._active()
        self.begins = self._beginnings()
        self.phases = 2 if said.base in ("lstm", "gru_reset_before") else 1
        self.slots = slots(said)
        self.is_exact = self.dtype == torch.float32 and is_exact(self.dtype)

    # What both passes need ------------------------------------------------------------------------------------------

    def _rows(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the rows' order, their lengths in it, and where each step's rows begin."""
        request = self.request
        if request.batch_sizes is not None:
            sizes = request.batch_sizes
            offsets = (torch.cumsum(sizes, 0) - sizes).to(self.device)
            each = torch.arange(self.batch)
            lengths = (sizes[:, None] > each).sum(0).to(self.device)
            return None, lengths.to(torch.int32), offsets
        if request.lengths is None:
            return None, None, None
        lengths, order = torch.sort(request.lengths, descending=True, stable=True)
        return order, lengths.to(torch.int32), None

    def _active(self) -> Tensor | None:
        """Return which places of padded rows are real (places,), or `None` for all."""
        if self.request.lengths is None:
            return None
        return (torch.arange(self.steps, device=self.device)[:, None] < self.request.lengths).flatten()

    def _beginnings(self) -> Tensor | None:
        """Return where each direction's state starts anew, (D, T, B): a boundary before t is met, in reverse, before t − 1."""
        reset = self.request.reset
        if reset is None:
            return None
        later = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        ways = [later if direction.reverse else reset for direction in self.request.directions]
        begins = torch.stack(ways)
        return (begins if self.active is None else begins & self.active.view_as(reset)).view(torch.uint8)

    def _stacked(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return a parameter of all directions (D, …), or `None` where there is none."""
        tensors = [getattr(direction.parameters, name) for direction in self.request.directions]
        if tensors[0] is None:
            return None
        return torch.stack([t.to(dtype or t.dtype) for t in tensors])

    def _states(self, which: int) -> Tensor | None:
        """Return h_0 or c_0 of all directions, (D, B, H)."""
        states = [direction.initial[which] for direction in self.request.directions if which < len(direction.initial)]
        return torch.stack(states) if states else None

    def _shared(self) -> dict[str, Any]:
        """Return the arguments that both kernels take."""
        said, masks = self.request.spec, self.request.masks
        zoneout_h, zoneout_c, dropped = masks
        shares = [0.0 if m is None or m.dim() else float(m) for m in (zoneout_h, zoneout_c)]
        as_bytes = [
            None if m is None or not m.dim() else m.contiguous().view(torch.uint8) for m in (zoneout_h, zoneout_c)
        ]
        return {
            "weight_ch": self._stacked("weight_ch", torch.float32),
            "gain_hh": self._stacked("gain_hh", torch.float32),
            "gain_c": self._stacked("gain_c", torch.float32),
            "shift_c": self._stacked("shift_c", torch.float32),
            "h_0": self._states(0),
            "c_0": self._states(1),
            "zoneout_h": as_bytes[0],
            "zoneout_c": as_bytes[1],
            "dropped": None if dropped is None else dropped.contiguous(),
            "offsets": self.offsets,
            "order": self.order,
            "lengths": self.lengths,
            "begins": self.begins,
            "batch": self.batch,
            "steps": self.steps,
            "hidden": self.hidden,
            "share_h": shares[0],
            "share_c": shares[1],
            "BASE": said.base,
            "COUPLED": "coupled" in said.variants,
            "EXPECTED_H": zoneout_h is not None and not zoneout_h.dim(),
            "EXPECTED_C": zoneout_c is not None and not zoneout_c.dim(),
            "WAYS": self.ways,
            "REVERSE": int(self.ways == 1 and self.request.directions[0].reverse),
            "GATES": self.gates,
            "SLOTS": self.slots,
            "KIND": DTYPES[self.dtype],
            "PRECISION": "ieee" if self.is_exact else "tf32",
            "HALVES": self.holds_halves,
        }

    @functools.cached_property
    def _weight(self) -> Tensor:
        """W_hh (D, G, H, H)."""
        stacked = self._stacked("weight_hh", self.dtype)
        assert stacked is not None
        return stacked.view(self.ways, self.gates, self.hidden, self.hidden)

    def _sums(self, parts: int) -> Tensor | None:
        if not self.is_normalised:
            return None
        return unset((self.places, self.ways, self.phases, parts, 2), torch.float32, self.device).view(torch.int32)

    def _exchanged(self, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return what programs exchange as integers as wide as a number, and as integers that are loaded."""
        if tensor is None:
            return None, None
        return tensor.view(INTEGERS[self.dtype]), tensor.view(
            torch.int32 if self.holds_halves else INTEGERS[self.dtype]
        )

    def _launch(self, kernel: Any, cut: Tiling, arguments: dict[str, Any]) -> None:
        """Launch a time loop for as many groups of rows at once as can run together."""
        parts, groups = divided_up(self.hidden, cut.units), divided_up(self.batch, cut.rows)
        at_least = triton.next_power_of_2(parts)
        arguments |= {
            "ROWS": cut.rows,
            "UNITS": cut.units,
            "PARTS": at_least,
            "COPIES": max(1, 32 * cut.warps // (cut.rows * at_least * 2)),
            "CHUNK": cut.chunk,
        }
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:  # Triton launches on the current one
            for first in range(0, groups, cut.groups):
                grid = parts, min(cut.groups, groups - first), self.ways
                options = {"num_warps": cut.warps, "num_stages": 1, "launch_cooperative_grid": True}
                kernel[grid](**arguments, first_row=first * cut.rows, **options)

    # The input's part of the gates ----------------------------------------------------------------------------------

    def _weight_ih(self) -> Tensor:
        """Return W_ih of all directions, (D G H, I)."""
        stacked = self._stacked("weight_ih", self.dtype)
        assert stacked is not None
        return stacked.flatten(0, 1)

    def _ids(self) -> Tensor | None:
        """Return the token ids (places,), or `None`; those of the padding are zero."""
        if not self.request.reads_ids:
            return None
        ids = self.request.input.flatten()
        return ids if self.active is None else torch.where(self.active, ids, 0)

    def _input(self) -> Tensor:
        """Return x (places, I), zero in the padding, where not even a NaN matters."""
        input = self.request.input.flatten(0, -2)
        return input if self.active is None else torch.where(self.active[:, None], input, 0)

    def _before_gain(self) -> Tensor:
        """Return W_ih x of each place, or of each token, as float32 (rows, D G H)."""
        if self.request.reads_ids:
            return self._weight_ih().t().float().contiguous()
        return multiply(self._input(), self._weight_ih().t())

    def _of_input(self) -> Tensor:
        """Return what the gates get of the input, without bias."""
        x = self._before_gain()
        gain = self._stacked("gain_ih", torch.float32)
        if gain is None:
            return x
        rows = x.view(-1, self.ways, self.gates * self.hidden)
        return (torch.nn.functional.layer_norm(rows, rows.shape[-1:], None, None, EPSILON) * gain).flatten(1)

    def _bias(self) -> Tensor | None:
        """Return what is added to the columns of the forward pass, (D, 4, H), or (D, 1, H) of an RNN."""
        bias_ih, bias_hh = self._stacked("bias_ih", torch.float32), self._stacked("bias_hh", torch.float32)
        if bias_ih is None or bias_hh is None:
            return None
        bias_ih, bias_hh = (b.view(self.ways, self.gates, self.hidden) for b in (bias_ih, bias_hh))
        if self.request.spec.base == "gru":
            return torch.cat([bias_ih[:, :2] + bias_hh[:, :2], bias_hh[:, 2:], bias_ih[:, 2:]], 1)
        bias = bias_ih + bias_hh
        return torch.cat([bias, torch.zeros_like(bias[:, :1])], 1) if self.gates == 3 else bias

    # The passes -----------------------------------------------------------------------------------------------------

    def forward(self, keep: bool) -> Result:
        """Compute output, final state and what the backward pass needs."""
        request, shape = self.request, (self.places, self.ways, self.hidden)
        states = [self._states(which) for which in range(len(request.spec.states))]
        if self.places == 0:
            final = [s.clone() for s in request.initial]
            return Result(request.like.new_zeros(request.output_shape), final, self._nothing_saved() if keep else [])
        dropped, base = request.masks.recurrent_dropout, request.spec.base
        h_0 = states[0]
        assert h_0 is not None
        h_in_0 = as_set(h_0 if dropped is None else h_0 * dropped).view(-1, self.hidden)
        rows = torch.cat([unset((self.places * self.ways, self.hidden), self.dtype, self.device), h_in_0])
        second = unset(shape, self.dtype, self.device) if base == "gru_reset_before" else None
        new = functools.partial(torch.empty, device=self.device)
        output = None if dropped is None else new(shape, dtype=self.dtype)
        saved = new((self.places, self.ways, self.slots, self.hidden), dtype=self.dtype) if keep else None
        cells = new(shape, dtype=self.dtype) if keep and base == "lstm" else None
        scales = new((self.places, self.ways, 3), dtype=torch.float32) if keep and self.is_normalised else None
        final = [torch.empty_like(s) for s in states if s is not None]
        both = tilings(request)
        assert both is not None
        cut, _ = both
        exchanged, words = self._exchanged(rows)
        second_exchanged, second_words = self._exchanged(second)
        self._launch(
            forward_loop,
            cut,
            self._shared()
            | {
                "weight_words": self._exchanged(self._weight)[1],
                "x": self._of_input(),
                "ids": self._ids(),
                "bias": self._bias(),
                "h_in": exchanged,
                "words": words,
                "second": second_exchanged,
                "second_words": second_words,
                "sums": self._sums(divided_up(self.hidden, cut.units)),
                "output": output,
                "saved": saved,
                "cells": cells,
                "scales": scales,
                "h_n": final[0],
                "c_n": final[1] if len(final) > 1 else None,
                "places": self.places,
                "CHUNKS": cut.chunks(self.width),
                "PIECES": cut.pieces(4 * cut.units if self.gates > 1 else cut.units, self.is_exact),
                "PIECES_N": cut.pieces(cut.units, self.is_exact),
            },
        )
        h_in = rows[: self.places * self.ways].view(shape)
        kept = []
        if keep:
            kept = [t for t in (saved, cells, scales, second) if t is not None]
            kept += [h_in] if dropped is not None else []
        out = self._clean(h_in if output is None else output)
        ends = [s[way] for way in range(self.ways) for s in final]
        return Result(out.view(request.output_shape), ends, kept)

    def _clean(self, steps: Tensor) -> Tensor:
        """Make an array of steps zero in the padding."""
        if self.active is not None:
            steps.masked_fill_(~self.active.view(-1, *[1] * (steps.dim() - 1)), 0)
        return steps

    def _nothing_saved(self) -> list[Tensor]:
        return [self.request.like.new_empty(shape, dtype=dtype) for shape, dtype in self.saved_shapes(self.request)]

    @staticmethod
    def saved_shapes(request: Request) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shapes and dtypes of what a forward pass keeps."""
        said, hidden = request.spec, request.directions[0].initial[0].shape[1]
        *places, _ = request.output_shape
        shape = math.prod(places), len(request.directions), hidden
        kept: list[tuple[tuple[int, ...], torch.dtype]] = [((*shape[:2], slots(said), hidden), request.dtype)]
        if said.base == "lstm":
            kept.append((shape, request.dtype))
        if said.is_normalised:
            kept.append(((*shape[:2], 3), torch.float32))
        return kept + [(shape, request.dtype)] * (
            (said.base == "gru_reset_before") + ("recurrent_dropout" in said.masks)
        )

    def backward(
        self,
        grad_output: Tensor | None,
        grad_final: Sequence[Tensor | None],
        output: Tensor,
        saved: Sequence[Tensor],
        needs_input: bool,
    ) -> Gradient:
        """Backpropagate through time."""
        request, base = self.request, self.request.spec.base
        check_backward(request, grad_output, grad_final, output, saved, self.saved_shapes(self.request))
        if self.places == 0:
            zeros = [torch.zeros_like(p) for p in request.parameters]
            ends = [
                torch.zeros_like(s) if g is None else g.clone()
                for s, g in zip(request.initial, grad_final, strict=True)
            ]
            return Gradient(torch.zeros_like(request.input) if needs_input else None, ends, zeros)
        slots, *others = saved
        cells = others.pop(0) if base == "lstm" else None
        scales = others.pop(0) if self.is_normalised else None
        second = others.pop(0) if base == "gru_reset_before" else None
        h_in = others.pop(0) if others else output.view(self.places, self.ways, self.hidden)
        both = tilings(request)
        assert both is not None
        _, cut = both
        groups = divided_up(self.batch, cut.rows)
        new = functools.partial(torch.empty, device=self.device)
        shape = self.places, self.ways, self.gates, self.hidden
        flow = unset(shape, self.dtype, self.device)
        exchanged, words = self._exchanged(flow)
        is_apart = self.is_normalised or base == "gru"
        inner = new(shape, dtype=self.dtype) if is_apart else None
        has_totals = self.is_normalised or self.has_peepholes or base == "gru"
        totals = new((self.ways, groups, 10, self.hidden), dtype=torch.float32) if has_totals else None
        each = [split(list(grad_final), self.ways)[way] for way in range(self.ways)]
        zero = request.like.new_zeros(())
        grads = [
            torch.stack([zero.expand(self.batch, self.hidden) if own[which] is None else own[which] for own in each])
            for which in range(len(request.spec.states))
        ]
        starts = [torch.empty_like(g) for g in grads]
        self._launch(
            backward_loop,
            cut,
            self._shared()
            | {
                "weight_words": self._exchanged(self._weight.flatten(1, 2).transpose(1, 2).contiguous())[1],
                "output": output.view(self.places, self.ways, self.hidden),
                "saved": slots,
                "cells": cells,
                "scales": scales,
                "grad_output": torch.zeros_like(output) if grad_output is None else grad_output.contiguous(),
                "grad_h_n": grads[0],
                "grad_c_n": grads[1] if len(grads) > 1 else None,
                "flow": exchanged,
                "flow_words": words,
                "inner": inner,
                "sums": self._sums(divided_up(self.hidden, cut.units)),
                "grad_h_0": starts[0],
                "grad_c_0": starts[1] if len(starts) > 1 else None,
                "totals": totals,
                "groups": groups,
                "CHUNKS": cut.chunks((2 if base == "gru_reset_before" else self.gates) * self.width),
                "CHUNKS_N": cut.chunks(self.width),
                "PIECES": cut.pieces(cut.units, self.is_exact),
                "PIECES_N": cut.pieces(cut.units, self.is_exact),
            },
        )
        flow = self._clean(flow)
        inner = flow if inner is None else self._clean(inner)
        sums = None if totals is None else totals.sum(1)
        grad_input, of_input = self._input_backward(inner.flatten(1), needs_input)
        recurrent = self._recurrent_gradients(flow, h_in, second)
        biases = self._bias_gradients(flow, inner, sums)
        parameters = [
            self._parameters(way, of_input[way], recurrent[way], biases[way], None if sums is None else sums[way])
            for way in range(self.ways)
        ]
        dtypes = [p.dtype for p in request.parameters]
        found = [p.to(dtype) for p, dtype in zip([p for own in parameters for p in own], dtypes, strict=True)]
        initial = [s[way] for way in range(self.ways) for s in starts]
        return Gradient(grad_input, initial, found)

    def _input_backward(
        self, grad: Tensor, needs_input: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor | None]]]:
        """Return ∂x, and of each direction ∂W_ih and the gradient of `gain_ih`, from that of what the gates got of the input."""
        request, ids = self.request, self._ids()
        width = self.gates * self.hidden
        if ids is not None:
            vocabulary = self._weight_ih().shape[1]
            if vocabulary <= _SMALL_VOCABULARY:
                grad = multiply(one_hot(ids, vocabulary).to(grad.dtype).t(), grad)
            else:  # sorted by id, so its bits are the same each time
                grad = grad.new_zeros((vocabulary, grad.shape[1]), dtype=torch.float32).index_put_(
                    (ids,), grad.float(), accumulate=True
                )
        gains: list[Tensor | None] = [None] * self.ways
        gain = self._stacked("gain_ih", torch.float32)
        if gain is not None:
            rows = self._before_gain().view(-1, self.ways, width)
            standard, _, scale = torch.native_layer_norm(rows, [width], None, None, EPSILON)
            above = grad.view(-1, self.ways, width).float()
            gains = list((above * standard).sum(0))
            above = above * gain
            along = (above * standard).mean(-1, keepdim=True)
            grad = ((above - above.mean(-1, keepdim=True) - standard * along) * scale).flatten(1)
            grad = grad if ids is not None else grad.to(self.dtype)
        if ids is not None:
            return None, list(zip(grad.t().split(width), gains, strict=True))
        weights = multiply(grad.t(), self._input())
        grad_input = None
        if needs_input:
            grad_input = multiply(grad, self._weight_ih(), self.dtype).view_as(request.input)
        return grad_input, list(zip(weights.split(width), gains, strict=True))

    def _recurrent_gradients(self, flow: Tensor, h_in: Tensor, second: Tensor | None) -> list[Tensor]:
        """Return ∂W_hh of each direction."""
        before = self._states_before(h_in)
        found = []
        for way in range(self.ways):
            grad = flow[:, way].flatten(1)
            if second is None:
                found.append(multiply(grad.t(), before[way]))
                continue
            rows = 2 * self.hidden
            v = self._clean(second[:, way].clone()) if self.active is not None else second[:, way]
            found.append(torch.cat([multiply(grad[:, :rows].t(), before[way]), multiply(grad[:, rows:].t(), v)]))
        return found

    def _states_before(self, h_in: Tensor) -> list[Tensor]:
        """Return, of each direction, the state that W_hh met at each place, (places, H); what it is in the padding doesn't matter
        as long as it is finite.
        """
        dropped, found = self.request.masks.recurrent_dropout, []
        for way, direction in enumerate(self.request.directions):
            start = direction.initial[0] if dropped is None else direction.initial[0] * dropped
            own = h_in[:, way]
            if self.offsets is not None:
                found.append(self._packed_before(own, start, direction.reverse))
                continue
            steps = own.reshape(self.steps, self.batch, self.hidden)
            if self.active is not None and h_in is not self.request.input:
                steps = torch.where(self.active.view(self.steps, self.batch, 1), steps, start)
            if direction.reverse:
                before = torch.cat([steps[1:], start[None]])
            else:
                before = torch.cat([start[None], steps[:-1]])
            if self.begins is not None:
                before = torch.where(self.begins[way].view(torch.bool)[:, :, None], start, before)
            found.append(before.flatten(0, 1))
        return found

    def _packed_before(self, own: Tensor, start: Tensor, is_reverse: bool) -> Tensor:
        """The same for packed rows."""
        assert self.request.batch_sizes is not None
        sizes = self.request.batch_sizes
        if not is_reverse:
            earlier = (
                torch.cat([own[o : o + n] for o, n in zip(self._first_places()[:-1], sizes[1:].tolist(), strict=True)])
                if len(sizes) > 1
                else own[:0]
            )
            return torch.cat([start, earlier])
        first, sizes = self._first_places(), sizes.tolist()
        rows = []
        for t, count in enumerate(sizes):
            later = sizes[t + 1] if t + 1 < len(sizes) else 0
            rows += [own[first[t] + count : first[t] + count + later], start[later:count]]
        return torch.cat(rows)

    def _first_places(self) -> list[int]:
        assert self.request.batch_sizes is not None
        sizes = self.request.batch_sizes
        return (torch.cumsum(sizes, 0) - sizes).tolist()

    def _bias_gradients(self, flow: Tensor, inner: Tensor, sums: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
        """Return the gradients of both biases of each direction, float32."""
        if not self.has_bias:
            return [None] * self.ways
        outer = inner.sum(0, dtype=torch.float32).flatten(1)
        if self.request.spec.base != "gru":
            return [(own, own) for own in outer]
        assert sums is not None
        rows = 2 * self.hidden
        return [(own, torch.cat([own[:rows], total[9]])) for own, total in zip(outer, sums, strict=True)]

    def _parameters(
        self,
        way: int,
        of_input: tuple[Tensor, Tensor | None],
        weight_hh: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        sums: Tensor | None,
    ) -> list[Tensor]:
        """Return one direction's gradients in the order of its parameters."""
        weight_ih, gain_ih = of_input
        found = {"weight_ih": weight_ih, "weight_hh": weight_hh}
        if biases is not None:
            found |= {"bias_ih": biases[0], "bias_hh": biases[1]}
        if sums is not None and self.has_peepholes:
            rows = sums[7:9] if self.gates == 3 else sums[6:9]
            found["weight_ch"] = rows.flatten()
        if sums is not None and gain_ih is not None:
            found |= {"gain_ih": gain_ih, "gain_hh": sums[: self.gates].flatten()}
            if "c" in self.request.spec.states:
                found |= {"gain_c": sums[4], "shift_c": sums[5]}
        return [found[name] for name in self.request.directions[way].parameters.there()]
