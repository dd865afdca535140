"""The recurrence as a torch operator, and the choice of who computes it.

`torch.ops.throughtime.recurrence` is one layer in one direction, or, by the plain native kernels, in both at once, for every
cell. It has autograd rules (differentiable twice and more), and a fake rule, so that `torch.compile` and `torch.export` see one
opaque node whatever T is.
`run_stack` runs layers and directions over it, or hands a whole stack to torch's own fused call where that can express
the request.

| backend | what computes |
|---|---|
| `native` | the C++ kernels: float32, float64 and bfloat16 on the CPU, every cell, lengths and resets at no detour |
| `reference` | the equations in `cells`, step by step in plain torch: any device, any floating dtype |
| `torch` | torch's own fused call (oneDNN, cuDNN): no resets, no reset-before GRU |

The input's dtype is that of output and state. Parameters may be wider (autocast): they are rounded for the computation,
and their gradients have their own dtype.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.functional import dropout, linear, one_hot
from torch.nn.functional import embedding as look_up
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from throughtime.arguments import (
    check_backward,
    check_devices,
    check_directions,
    check_forward,
    check_token_ids,
    steps_and_batch,
)
from throughtime.cells import CELLS, Cell, Masks, Parameters, find, sequence
from throughtime.errors import InputError, unknown_name
from throughtime.kernels import cpu, native, torch_fused, variants
from throughtime.kernels.request import shares

Tensors = list[Tensor]

_library = torch.library.Library("throughtime", "DEF")
_library.define(
    "recurrence(Tensor input, Tensor[] initial, Tensor[] parameters, Tensor? lengths, Tensor? reset, "
    "Tensor[] masks, str cell, bool reverse, bool keep, str backend, Tensor? batch_sizes=None, int recompute_every=0, "
    "bool bidirectional=False) "
    "-> (Tensor output, Tensor[] final, Tensor[] saved)"
)
_library.define(
    "recurrence_backward(Tensor grad_output, Tensor[] grad_final, Tensor input, Tensor[] initial, Tensor[] parameters, "
    "Tensor output, Tensor[] saved, Tensor? lengths, Tensor? reset, Tensor[] masks, str cell, bool reverse, "
    "bool needs_input, str backend, Tensor? batch_sizes, int recompute_every, bool bidirectional) "
    "-> (Tensor grad_input, Tensor[] grad_initial, Tensor[] grad_parameters)"
)


_BACKENDS = "native", "reference", "torch"


def backends() -> dict[str, str]:
    """Say which backends can compute here and what each is; without a compiled module there is no "native".

    Example:
        >>> print(backends()["reference"])
        the equations, step by step in plain torch
    """
    found = {} if native.missing else {"native": native.description()}
    return found | {
        "reference": "the equations, step by step in plain torch",
        "torch": f"torch {torch.__version__}'s own fused call",
    }


def check_backend(name: str) -> None:
    """Check that a backend may be asked for.

    Args:
        name: "auto" or a key of `backends()`.

    Raises:
        InputError: There is no such backend, or it isn't in this installation.
    """
    if name == "native" and native.missing:
        raise InputError(f"backend 'native' can't be had: {native.missing}; use backend='auto', or {native.ADVICE}")
    if name not in ("auto", *_BACKENDS):
        raise unknown_name("backend", name, ["auto", *backends()])


@dataclass(frozen=True)
class Stack:
    """A stack of recurrent layers, apart from its tensors.

    Attributes:
        cell: Name of the cell with its variants, but for those that take masks; see `cells.find`.
        num_layers: L.
        bidirectional: Whether each layer runs both ways.
        dropout: Probability with which an output of any layer but the last is dropped; 0 outside training.
        backend: "auto" or a key of `backends()`.
        zoneout: Probabilities (of c, of h) with which a unit keeps its old value.
        zoneout_is_expected: Whether zoneout's expectation stands for its masks: outside training.
        recurrent_dropout: Probability with which a unit of h_{t−1} is hidden from W_hh all along; 0 outside training.
        recompute_every: Keep for the backward pass only the state, in every so many steps; 0 to keep all that it needs.
    """

    cell: str
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    backend: str = "auto"
    zoneout: tuple[float, float] = (0.0, 0.0)
    zoneout_is_expected: bool = False
    recurrent_dropout: float = 0.0
    recompute_every: int = 0

    @property
    def whole_cell(self) -> str:
        """Name of the cell with all its variants."""
        of_c, of_h = self.zoneout
        if not (of_c or of_h or self.recurrent_dropout):
            return self.cell
        variants = {"zoneout_h": of_h, "zoneout_c": of_c, "recurrent_dropout": self.recurrent_dropout}
        return "+".join([self.cell, *(name for name, probability in variants.items() if probability)])

    @property
    def directions(self) -> int:
        """1, or 2 when bidirectional."""
        return 2 if self.bidirectional else 1


_NO_RULE = "they have no rule for torch.func's transforms and forward-mode differentiation"


def _is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is on: those the equations serve, in plain torch."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def choose_backend(stack: Stack, input: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None) -> str:
    """Return the fastest backend that is right for the request, or the named one.

    Where that is because the native module isn't there, a `MissingKernelsWarning` says so, once in a process.

    Raises:
        InputError: The named backend is unknown, or not in this installation.
        NotImplementedError: The named backend can't serve the request.
    """
    cell, is_auto = stack.whole_cell, stack.backend == "auto"
    is_transformed = _is_transformed()
    refusals = {"native": _NO_RULE if is_transformed else native.refusal(cell, input)}
    if is_auto and refusals["native"] and refusals["native"] == native.missing:
        native.warn_of_absence()
    if is_auto and torch.compiler.is_compiling():
        # torch's fused calls don't trace with a dynamic T, and how much the kernels keep depends on the lengths.
        return "native" if lengths is None and not refusals["native"] else "reference"
    if is_auto and not refusals["native"]:
        return "native"
    refusals["torch"] = torch_fused.refusal(cell, reset)
    if is_auto and is_transformed:
        return "reference"
    if stack.recompute_every:
        refusals["torch"] = "it keeps all that its backward pass needs"
    if is_auto:
        return "reference" if refusals["torch"] else "torch"
    check_backend(stack.backend)
    if reason := refusals.get(stack.backend):
        raise NotImplementedError(f"backend {stack.backend!r} can't serve this request: {reason}; use backend='auto'")
    return stack.backend


def run_stack(
    stack: Stack,
    weights: list[Tensors],
    input: Tensor,
    state: tuple[Tensor, ...],
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    embedding: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack over padded input. The arguments have been checked.

    Args:
        stack: What to run.
        weights: Flat parameters of each layer and direction, in torch's order (layer 0, layer 0 reverse, layer 1, …).
        input: (T, B, I), whose dtype is that of the results, or token ids (T, B), where the state's is.
        state: (h_0,) or (h_0, c_0), each (L · directions, B, ·).
        lengths: (B,), or `None`.
        reset: (T, B), or `None`.
        embedding: (V, I): x is its row of a token's id. Without it x is one-hot.

    Returns:
        The output (T, B, directions · P) and the final state, shaped like `state`.
    """
    backend = choose_backend(stack, input if input.is_floating_point() else state[0], lengths, reset)
    if not input.is_floating_point():
        input, weights = _read_tokens(stack, backend, weights, input, lengths, embedding, state[0].dtype)
    if backend != "torch":
        return _run_layers(stack, backend, weights, input, state, lengths, reset)
    weights = [_cast(row, input.dtype) for row in weights]
    if lengths is None:
        return torch_fused.run(stack.cell, input, state, weights, stack.num_layers, stack.dropout, stack.bidirectional)
    return _run_ragged_fused(stack, weights, input, state, lengths)


def run_stack_packed(
    stack: Stack,
    weights: list[Tensors],
    packed: PackedSequence,
    state: tuple[Tensor, ...],
    embedding: Tensor | None = None,
) -> tuple[PackedSequence, tuple[Tensor, ...]]:
    """Run a stack over a PackedSequence; `state` is in the caller's order of rows, and so is the final state."""
    reads_ids = not packed.data.is_floating_point()
    backend = choose_backend(stack, state[0] if reads_ids else packed.data, packed.batch_sizes)
    if backend == "torch":
        if reads_ids:
            x, _ = _read_tokens(stack, backend, weights, packed.data[None], None, embedding, state[0].dtype)
            packed = packed._replace(data=x[0])
        weights = [_cast(row, packed.data.dtype) for row in weights]
        return torch_fused.run_packed(
            stack.cell, packed, state, weights, stack.num_layers, stack.dropout, stack.bidirectional
        )
    data, order = packed.data, packed.sorted_indices
    if reads_ids:
        data, weights = _read_tokens(stack, backend, weights, data, None, embedding, state[0].dtype)
    if order is not None:  # inside, the rows of the state are in the order of the packed ones
        state = tuple(s.index_select(1, order) for s in state)
    output, final = _run_layers(stack, backend, weights, data, state, None, None, packed.batch_sizes, order)
    if packed.unsorted_indices is not None:
        final = tuple(s.index_select(1, packed.unsorted_indices) for s in final)
    return packed._replace(data=output), final


def _read_tokens(
    stack: Stack,
    backend: str,
    weights: list[Tensors],
    ids: Tensor,
    lengths: Tensor | None,
    embedding: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensors]]:
    """Return what the first layer reads instead of ids (T, B), and with which weights.

    The operator takes ids as one-hot vectors: they choose columns of `weight_ih`. Of embedded tokens these are W_ih Eᵀ,
    a product of V columns in place of one of T · B rows, so it is done where V is the smaller.
    """
    if embedding is not None and backend == "native" and _is_small(embedding, ids):
        tables = [linear(embedding, row[0]).to(row[0].dtype).t() for row in weights[: stack.directions]]
        first = [[table, *row[1:]] for table, row in zip(tables, weights, strict=False)]
        return ids, [*first, *weights[stack.directions :]]
    if embedding is None and backend != "torch":
        return ids, weights
    is_real = None if lengths is None else _is_real(ids, lengths)
    if not torch.compiler.is_compiling():
        check_token_ids(ids, weights[0][0].shape[1] if embedding is None else embedding.shape[0], is_real)
    if is_real is not None:
        ids = torch.where(is_real, ids, 0)
    x = one_hot(ids, weights[0][0].shape[1]) if embedding is None else look_up(ids, embedding)
    return x.to(dtype), weights


def _is_small(embedding: Tensor, ids: Tensor) -> bool:
    """Whether a table of all tokens is made faster than the rows of those that are there; unknown while a graph is traced."""
    return not torch.compiler.is_compiling() and embedding.shape[0] <= ids.numel()


def _is_real(ids: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(ids.shape[0], device=ids.device)[:, None] < lengths


def _run_ragged_fused(
    stack: Stack, weights: list[Tensors], input: Tensor, state: tuple[Tensor, ...], lengths: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Serve `lengths` by packing. An empty row can't be packed: it travels as one step of zeros, put right afterwards."""
    is_empty = lengths == 0
    input = torch.where(is_empty[:, None], 0, input)
    packed = pack_padded_sequence(input, lengths.clamp(min=1).cpu(), enforce_sorted=False)
    packed_output, final = torch_fused.run_packed(
        stack.cell, packed, state, weights, stack.num_layers, stack.dropout, stack.bidirectional
    )
    output, _ = pad_packed_sequence(packed_output, total_length=input.shape[0])
    keep = is_empty[:, None]
    return torch.where(keep, 0, output), tuple(torch.where(keep, s, f) for s, f in zip(state, final, strict=True))


def _run_layers(
    stack: Stack,
    backend: str,
    weights: list[Tensors],
    input: Tensor,
    state: tuple[Tensor, ...],
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack layer by layer and direction by direction over the operator.

    With `batch_sizes` the input is packed, and `order` says which row of the batch each of the state's is.
    """
    steps = (input if batch_sizes is None else batch_sizes).shape[0]
    # In a graph that is being traced the number of segments would fix the number of steps: there all is kept.
    recompute_every = 0 if torch.compiler.is_compiling() else stack.recompute_every
    finals: list[Tensors] = []
    states = [s.unbind() for s in state]
    at_once = stack.bidirectional and backend == "native" and "+" not in stack.whole_cell
    for layer in range(stack.num_layers):
        outputs: Tensors = []
        for direction in range(1 if at_once else stack.directions):
            row = layer * stack.directions + direction
            rows = range(row, row + 2) if at_once else [row]
            initial, parameters = [s[r] for r in rows for s in states], [p for r in rows for p in weights[r]]
            keep = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *initial, *parameters))
            masks = _draw_masks(stack, steps, initial)
            if order is not None:
                masks = [mask if mask.dim() == 0 else mask.index_select(mask.dim() - 2, order) for mask in masks]
            output, final = _recur(
                *(input, initial, parameters, lengths, reset, masks, stack.whole_cell, direction == 1, keep, backend),
                *(batch_sizes, recompute_every, at_once),
            )
            outputs.append(output)
            finals += [final[: len(state)], final[len(state) :]] if at_once else [final]
        input = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if layer < stack.num_layers - 1:
            input = dropout(input, stack.dropout)
    return input, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))


def _recur(*arguments: Any) -> tuple[Tensor, Tensors]:
    """Run the operator, of whose arguments these are, without torch's dispatcher where nobody watches that.

    Through it, and checked anew for the backward pass, a training call takes 85 µs longer: as long as some twenty steps of a
    single row (docs/log.md).
    """
    if _is_transformed():
        output, final, _ = _compute_openly(*arguments)
        return output, final
    input, initial, parameters, lengths, reset, masks, _, _, _, backend, batch_sizes, _, _ = arguments
    if backend != "native" or _is_watched(input, *initial, *parameters, lengths, reset, *masks, batch_sizes):
        output, final, _ = torch.ops.throughtime.recurrence.default(*arguments)
    else:
        output, final, _ = _differentiable(False, *arguments)
    return output, final


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether a call must go by torch's dispatcher: it is traced, recorded or profiled, or tensors only stand for others."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _draw_masks(stack: Stack, steps: int, initial: Tensors) -> Tensors:
    """Draw the masks that one layer takes in one direction, from torch's generator and in the order of `Cell.masks`."""
    h, c = initial[0], initial[-1]
    (of_c, of_h), masks = stack.zoneout, []
    for probability, state in ((of_h, h), (of_c, c)):
        if probability and stack.zoneout_is_expected:
            masks.append(torch.full((), probability, dtype=state.dtype, device=state.device))
        elif probability:
            masks.append(draw_mask(probability, (steps, *state.shape), state.device))
    if stack.recurrent_dropout:
        masks.append(dropout(torch.ones_like(h), stack.recurrent_dropout))
    return masks


def draw_mask(probability: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a mask that is true with `probability`, to 1/65,536: four elements a random number, as drawing them is slow."""
    count, levels = math.prod(shape), 1 << 16
    numbers = torch.randint(-(1 << 63), (1 << 63) - 1, ((count + 3) // 4,), device=device)
    below = min(round(probability * levels), levels - 1) - levels // 2
    return (numbers.view(torch.int16)[:count] < below).view(shape)


# The operator -------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "recurrence", "CompositeExplicitAutograd")
def _recurrence(
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: Tensors,
    cell: str,
    reverse: bool,
    keep: bool,
    backend: str,
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensors, Tensors]:
    """Run one layer in one direction, or in both. `keep` asks for what the backward pass needs; without it `saved` is empty."""
    _check_bidirectional(bidirectional, backend, cell)
    _check_recompute(recompute_every)
    if backend == "native":
        given = (cell, input, initial, parameters, lengths, reset, reverse, keep)
        if "+" in cell:
            return variants.forward(*given, masks, batch_sizes, recompute_every)
        return cpu.forward(*given, batch_sizes, recompute_every, bidirectional)
    kind = _check_reference(cell, input, initial, parameters, lengths, reset, masks, backend, batch_sizes)
    packing = None if batch_sizes is None else _Packing(batch_sizes, input.device)
    result = _run_reference(kind, input, initial, parameters, lengths, reset, reverse, masks, packing)
    keep = keep and not recompute_every
    saved = [torch.stack(field) for field in zip(*result.saved, strict=True)] if keep else []
    output = result.outputs if packing is None else packing.pack(result.outputs)
    # An operator's outputs must not alias its inputs, and an all-empty batch would hand the initial state through.
    return output, [s.clone() for s in result.final_state], saved


def _compute_openly(
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: Tensors,
    cell: str,
    reverse: bool,
    keep: bool,
    backend: str,
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensors, Tensors]:
    """Compute with the equations above the operator, where whatever transforms torch's operators sees each of them."""
    if bidirectional:
        raise NotImplementedError(f"backend {backend!r}: {_NO_RULE}; call it with reverse false and true")
    packing = None if batch_sizes is None else _Packing(batch_sizes, input.device)
    result = _run_reference(find(cell), input, initial, parameters, lengths, reset, reverse, masks, packing)
    output = result.outputs if packing is None else packing.pack(result.outputs)
    return output, list(result.final_state), []


def _check_recompute(recompute_every: int) -> None:
    if recompute_every < 0:
        raise ValueError(f"recompute_every = {recompute_every}; expected a number of steps, or 0 to recompute nothing")


def _check_bidirectional(bidirectional: bool, backend: str, cell: str) -> None:
    if bidirectional and (backend != "native" or "+" in cell):
        raise NotImplementedError(
            f"backend {backend!r} runs a {cell} one way at a time, and bidirectional is true; call it with reverse false and true"
        )


def _run_reference(
    kind: Cell,
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    masks: Tensors,
    packing: "_Packing | None",
) -> sequence.SequenceResult:
    """Compute with the equations, on padded arrays."""
    rounded = Parameters.from_list(_cast(parameters, initial[0].dtype), kind.extra)
    if packing is not None:
        input, lengths = packing.pad(input), packing.lengths
    x = _as_vectors(input, rounded.weight_ih, lengths)
    return sequence.forward(
        *(kind, x, tuple(initial), rounded, lengths, reset, reverse, Masks.from_list(masks, kind.masks))
    )


class _Packing:
    """Between packed rows (N, ·), step after step and the longest sequence first, and padded ones (T, B, ·)."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        ranks = torch.arange(int(batch_sizes[0]), device=device)
        is_there = ranks < batch_sizes.to(device)[:, None]
        self.shape = is_there.shape
        self.lengths = is_there.sum(0)
        self._index = is_there.flatten().nonzero()[:, 0]

    def pad(self, packed: Tensor) -> Tensor:
        """Return padded rows, zero where there are none."""
        steps, batch = self.shape
        padded = packed.new_zeros((steps * batch, *packed.shape[1:]))
        return padded.index_copy(0, self._index, packed).view(steps, batch, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """Return packed rows."""
        return padded.flatten(0, 1).index_select(0, self._index)


def _as_vectors(input: Tensor, weight_ih: Tensor, lengths: Tensor | None) -> Tensor:
    """Return input as the equations read it (T, B, I): token ids one-hot, with id 0 in the padding."""
    if input.is_floating_point():
        return input
    is_real = None if lengths is None else _is_real(input, lengths)
    return one_hot(input if is_real is None else torch.where(is_real, input, 0), weight_ih.shape[1]).to(weight_ih.dtype)


@torch.library.impl(_library, "recurrence_backward", "CompositeExplicitAutograd")
def _recurrence_backward(
    grad_output: Tensor,
    grad_final: Tensors,
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    output: Tensor,
    saved: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: Tensors,
    cell: str,
    reverse: bool,
    needs_input: bool,
    backend: str,
    batch_sizes: Tensor | None,
    recompute_every: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensors, Tensors]:
    """Backpropagate through a layer, one way or both: gradients for input (none if not needed), state and parameters."""
    _check_bidirectional(bidirectional, backend, cell)
    if backend == "native":
        given = (cell, grad_output, grad_final, input, initial, parameters, output, saved)
        given = (*given, lengths, reset, reverse, needs_input)
        rest = (batch_sizes, recompute_every)
        is_variant = "+" in cell
        gradient = variants.backward(*given, masks, *rest) if is_variant else cpu.backward(*given, *rest, bidirectional)
        grad_input, grad_initial, grad_parameters = gradient
        return grad_output.new_empty(0) if grad_input is None else grad_input, grad_initial, grad_parameters
    kind = _check_reference(cell, input, initial, parameters, lengths, reset, masks, backend, batch_sizes)
    rounded = Parameters.from_list(_cast(parameters, initial[0].dtype), kind.extra)
    steps, batch = steps_and_batch(input, batch_sizes)
    x = rounded.weight_ih.new_empty((batch, rounded.weight_ih.shape[1]))
    _, first = kind.step(x, tuple(initial), rounded)
    kept = [] if recompute_every else [(steps, *field.shape) for field in first]
    check_backward(input, initial, grad_output, grad_final, output, saved, kept)
    packing = None if batch_sizes is None else _Packing(batch_sizes, input.device)
    if recompute_every:  # a layer at once: the equations keep no state to start again from
        again = _run_reference(kind, input, initial, parameters, lengths, reset, reverse, masks, packing).saved
    else:
        again = [kind.saved(*fields) for fields in zip(*saved, strict=True)]
    if packing is not None:
        grad_output, lengths = packing.pad(grad_output), packing.lengths
    gradient = sequence.backward(
        *(kind, grad_output, tuple(grad_final), again, rounded),
        *(lengths, reset, reverse, Masks.from_list(masks, kind.masks)),
    )
    grad_input = gradient.inputs if needs_input else grad_output.new_empty(0)
    if needs_input and packing is not None:
        grad_input = packing.pack(grad_input)
    grad_parameters = _cast(gradient.parameters.to_list(), parameters[0].dtype)
    return grad_input, [g.clone() for g in gradient.initial_state], grad_parameters


def _check_reference(
    cell: str,
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: Tensors,
    backend: str,
    batch_sizes: Tensor | None,
) -> Cell:
    """Check what the equations are given, as the kernels check what they are given; return the cell."""
    if backend != "reference":
        raise unknown_name("backend", backend, ["native", "reference"])
    if (base := cell.partition("+")[0]) not in CELLS:
        raise unknown_name("cell", base, CELLS)
    kind = find(cell)
    check_forward(
        *(cell, kind.gates, kind.state_size, input, initial, parameters, (), lengths, reset),
        *(kind.extra, masks, kind.masks, batch_sizes),
    )
    if input.shape[0] == 0:
        raise ValueError(f"input has shape {tuple(input.shape)}; expected at least one step")
    return kind


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return [tensor.to(dtype) for tensor in tensors]


@torch.library.register_fake("throughtime::recurrence", lib=_library)
def _fake_recurrence(
    input,
    initial,
    parameters,
    lengths,
    reset,
    masks,
    cell,
    reverse,
    keep,
    backend,
    batch_sizes=None,
    recompute_every=0,
    bidirectional=False,
):
    check_devices(input, initial=initial, parameters=parameters, lengths=[lengths], reset=[reset], masks=masks)
    # One step of the equations on fake tensors tells every shape and dtype.
    kind = find(cell)
    _check_bidirectional(bidirectional, backend, cell)
    if bidirectional:
        check_directions(reverse, initial, parameters)
        states, own = len(initial) // 2, len(parameters) // 2
        rest = (lengths, reset, masks, cell, False, keep, backend, batch_sizes, recompute_every)
        halves = (initial[:states], parameters[:own]), (initial[states:], parameters[own:])
        one, other = (_fake_recurrence(input, *half, *rest) for half in halves)
        return torch.cat([one[0], other[0]], -1), [*one[1], *other[1]], [*one[2], *other[2]]
    steps, batch = (input if batch_sizes is None else batch_sizes).shape[0], initial[0].shape[0]
    rounded = Parameters.from_list(_cast(parameters, initial[0].dtype), kind.extra)
    x = rounded.weight_ih.new_empty((batch, rounded.weight_ih.shape[1]))
    state, saved = kind.step(x, tuple(initial), rounded)
    places = input.shape[:-1] if input.is_floating_point() else input.shape
    output = state[0].new_empty((*places, state[0].shape[1]))
    final = [torch.empty_like(s) for s in state]
    if not keep or (recompute_every and backend != "native"):
        return output, final, []
    if backend == "native":
        kernels = variants if "+" in cell else cpu
        widths = kernels.saved_widths(cell, hidden := parameters[1].shape[0] // kind.gates)
        if widths and recompute_every:
            count = kernels.segment_count(cell, steps, batch, hidden, output.dtype, recompute_every)
            return output, final, [s.new_empty((count, *s.shape), dtype=native.arithmetic_of(s.dtype)) for s in initial]
        is_ragged = lengths is not None and widths
        rows = torch.library.get_ctx().new_dynamic_size() if is_ragged else math.prod(places)
        return output, final, [output.new_empty((rows, width)) for width in widths]
    return output, final, [s.new_empty((steps, *s.shape)) for s in saved]


@torch.library.register_fake("throughtime::recurrence_backward", lib=_library)
def _(
    grad_output,
    grad_final,
    input,
    initial,
    parameters,
    output,
    saved,
    lengths,
    reset,
    masks,
    cell,
    reverse,
    needs_input,
    backend,
    batch_sizes,
    recompute_every,
    bidirectional,
):
    check_devices(input, initial=initial, parameters=parameters, lengths=[lengths], reset=[reset], masks=masks)
    check_devices(input, grad_output=[grad_output], grad_final=grad_final, output=[output], saved=saved)
    grad_input = torch.empty_like(input) if needs_input else grad_output.new_empty(0)
    return grad_input, [torch.empty_like(s) for s in initial], [torch.empty_like(p) for p in parameters]


class _Recurrence(torch.autograd.Function):
    """The derivative of `recurrence`, with its lists of tensors flat, as autograd.Function wants them.

    torch.library's own wrapper for lists goes through them with a general tree library, each way and in each pass: half a
    millisecond a call, as long as a hundred steps of a single row take.
    """

    @staticmethod
    def forward(
        ctx: Any, states: int, weights: int, drawn: int, is_watched: bool, rest: tuple[Any, ...], *tensors: Any
    ) -> Any:
        given = _unflatten((states, weights, drawn), tensors)
        input, initial, parameters, _, lengths, reset, batch_sizes = given
        cell, reverse, keep, backend, recompute_every, bidirectional = rest
        ctx.plan = None
        with torch._C._AutoDispatchBelowAutograd():
            if _is_planned(is_watched, cell, backend):
                _check_recompute(recompute_every)
                ways = batch_sizes, bidirectional
                ctx.plan = cpu.Plan(cell, input, initial, parameters, lengths, reset, reverse, *ways)
                output, final, saved = ctx.plan.forward(input, keep, recompute_every)
                ctx.plan.let_go(input, initial, parameters)
            else:
                output, final, saved = _run_operator(is_watched, given, rest)
        ctx.counts = states, weights, drawn
        ctx.rest = (cell, reverse, input.requires_grad, backend), (recompute_every, bidirectional)
        ctx.set_materialize_grads(False)  # else autograd would make zeros as large as all that is kept
        ctx.save_for_backward(*tensors, output, *saved)
        ctx.mark_non_differentiable(*saved)
        return output, *final, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        states, weights, drawn = ctx.counts
        count = 4 + states + weights + drawn
        tensors = ctx.saved_tensors  # each access makes them anew, and checkpointing allows one
        given, (output, *saved) = tensors[:count], tensors[count:]
        input, initial, parameters, masks, lengths, reset, batch_sizes = _unflatten(ctx.counts, given)
        (cell, reverse, needs_input, backend), (recompute_every, bidirectional) = ctx.rest
        plan, ctx.plan = ctx.plan, None  # what it keeps goes when autograd's own tensors go; a second pass plans anew
        is_open = _are_batched(grads) or _is_transformed()
        is_watched = torch.is_grad_enabled() or is_open or _is_watched(*grads, *given, output, *saved)
        plan = None if plan is None or is_watched else plan.take_up(input, initial, parameters)
        # The derivative of the derivative is asked for by running this pass with gradients on.
        seen = is_open or torch.is_grad_enabled()
        with contextlib.nullcontext() if seen else torch._C._AutoDispatchBelowAutograd():
            if plan is not None:
                made = grads[0], grads[1 : 1 + states], input, output, saved
                made = plan.backward(*made, needs_input, recompute_every)
            elif is_open:
                grad_output, grad_final = _filled(grads, output, initial)
                ways = (False, True) if bidirectional else (reverse,)
                again = input, initial, parameters, lengths, reset, masks, batch_sizes
                made = _backpropagate_openly(find(cell), ways, grad_output, grad_final, *again)
            else:
                grad_output, grad_final = _filled(grads, output, initial)
                made = torch.ops.throughtime.recurrence_backward.default(
                    *(grad_output, grad_final, input, initial, parameters, output, saved, lengths, reset, masks),
                    *(cell, reverse, needs_input, backend, batch_sizes, recompute_every, bidirectional),
                )
        grad_input, grad_initial, grad_parameters = made
        wanted = [grad_input if needs_input else None, *grad_initial, *grad_parameters]
        return *[None] * 5, *wanted, *[None] * (drawn + 3)


def _filled(grads: Sequence[Tensor | None], output: Tensor, initial: Sequence[Tensor]) -> tuple[Tensor, Tensors]:
    """Return the gradients of output and final state, zeros where there are none."""
    own, *others = [
        torch.zeros_like(like) if grad is None else grad
        for grad, like in zip(grads, (output, *initial), strict=False)  # those of what is kept follow
    ]
    return own, others


def _are_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether these are many gradients each, as `torch.autograd.grad(is_grads_batched=True)` gives them."""
    return any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads)


def _is_planned(is_watched: bool, cell: str, backend: str) -> bool:
    """Whether both passes can share what a plan holds, which an operator can't return."""
    return not is_watched and backend == "native" and "+" not in cell


def _run_operator(is_watched: bool, tensors: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Tensor, Tensors, Tensors]:
    """Run what is below autograd, through torch's dispatcher or without."""
    input, initial, parameters, masks, lengths, reset, batch_sizes = tensors
    cell, reverse, keep, backend, *more = rest
    run = torch.ops.throughtime.recurrence.default if is_watched else _recurrence
    given = (input, initial, parameters, lengths, reset, masks, cell, reverse, keep, backend)
    return run(*given, batch_sizes, *more)


def _unflatten(counts: tuple[int, int, int], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Cut input, initial state, parameters, masks, lengths, reset and batch sizes out of a flat list."""
    states, weights, drawn = counts
    input, *rest, lengths, reset, batch_sizes = tensors
    initial, rest = rest[:states], rest[states:]
    return input, initial, rest[:weights], rest[weights : weights + drawn], lengths, reset, batch_sizes


def _differentiable(
    is_watched: bool,
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: Tensors,
    cell: str,
    reverse: bool,
    keep: bool,
    backend: str,
    batch_sizes: Tensor | None = None,
    recompute_every: int = 0,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensors, Tensors]:
    """Run the operator, and keep its derivative where one is wanted."""
    if is_watched and _is_transformed():
        given = input, initial, parameters, lengths, reset, masks, cell, reverse, keep, backend
        return _compute_openly(*given, batch_sizes, recompute_every, bidirectional)
    rest = cell, reverse, keep, backend, recompute_every, bidirectional
    tensors = input, *initial, *parameters
    if not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            given = input, initial, parameters, masks, lengths, reset, batch_sizes
            return _run_operator(is_watched, given, rest)
    counts = len(initial), len(parameters), len(masks)
    output, *others = _Recurrence.apply(*counts, is_watched, rest, *tensors, *masks, lengths, reset, batch_sizes)
    return output, others[: counts[0]], others[counts[0] :]


def _with_gradient(*arguments: Any, **more: Any) -> tuple[Tensor, Tensors, Tensors]:
    return _differentiable(True, *arguments, **more)


_library.impl("recurrence", _with_gradient, "Autograd")


def _backpropagate_openly(
    kind: Cell,
    ways: Sequence[bool],
    grad_output: Tensor,
    grad_final: Sequence[Tensor],
    input: Tensor,
    initial: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    masks: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensors, Tensors]:
    """Backpropagate with the equations, in plain torch that whatever transforms it sees; `ways` says which are reverse."""
    dtype, drawn = parameters[-1].dtype, Masks.from_list(list(masks), kind.masks)
    packing = None if batch_sizes is None else _Packing(batch_sizes, input.device)
    if packing is not None:
        grad_output, input, lengths = packing.pad(grad_output), packing.pad(input), packing.lengths
    gradients = []
    own = zip(*(shares(list(part), len(ways)) for part in (grad_final, initial, parameters)), strict=True)
    for reverse, grad, (finals, states, weights) in zip(ways, grad_output.chunk(len(ways), -1), own, strict=True):
        rounded = Parameters.from_list(_cast(weights, grad_output.dtype), kind.extra)
        rest = lengths, reset, reverse, drawn
        result = sequence.forward(kind, _as_vectors(input, rounded.weight_ih, lengths), tuple(states), rounded, *rest)
        gradients.append(sequence.backward(kind, grad, tuple(finals), result.saved, rounded, *rest))
    grad_input = torch.stack([gradient.inputs for gradient in gradients]).sum(0)
    grad_parameters = _cast([p for gradient in gradients for p in gradient.parameters.to_list()], dtype)
    grad_initial = [s for gradient in gradients for s in gradient.initial_state]
    return grad_input if packing is None else packing.pack(grad_input), grad_initial, grad_parameters


def _save_twice(ctx, inputs, output) -> None:
    grad_output, grad_final, input, initial, parameters, _, saved, *rest = inputs
    lengths, reset, masks, cell, reverse, needs_input, _, batch_sizes, _, bidirectional = rest
    ctx.counts = len(grad_final), len(saved), len(masks)
    ctx.rest = cell, (False, True) if bidirectional else (reverse,), needs_input
    ctx.save_for_backward(*masks, grad_output, *grad_final, input, *initial, *parameters, lengths, reset, batch_sizes)


def _as_leaf(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or not tensor.is_floating_point():
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _differentiate_twice(ctx, grad_grad_input, grad_grad_initial, grad_grad_parameters):
    """Differentiate the backward pass by sending autograd through the reference, which is plain torch both ways."""
    states, kept, drawn = ctx.counts
    cell, ways, needs_input = ctx.rest
    kind = find(cell)
    *tensors, lengths, reset, batch_sizes = ctx.saved_tensors
    masks, tensors = tensors[:drawn], tensors[drawn:]
    with torch.enable_grad():
        leaves = [_as_leaf(t) for t in tensors]
        grad_output, *others = leaves
        grad_final, others = others[:states], others[states:]
        input, *others = others
        given = input, others[:states], others[states:], lengths, reset, masks, batch_sizes
        grad_input, grad_initial, grad_parameters = _backpropagate_openly(kind, ways, grad_output, grad_final, *given)
    results = [*grad_initial, *grad_parameters]
    weights = [*grad_grad_initial, *grad_grad_parameters]
    if needs_input:
        results, weights = [grad_input, *results], [grad_grad_input, *weights]
    place = 1 + states  # of the input, which has no gradient where it is token ids
    is_float = input.is_floating_point()
    grads = torch.autograd.grad(
        results,
        leaves if is_float else leaves[:place] + leaves[place + 1 :],
        weights,
        allow_unused=True,
        create_graph=torch.is_grad_enabled(),
    )
    grad_output, *grads = grads if is_float else [*grads[:place], None, *grads[place:]]
    grad_final, (input, *grads) = grads[:states], grads[states:]
    initial, parameters = grads[:states], grads[states:]
    return (
        grad_output,
        grad_final,
        input,
        initial,
        parameters,
        None,
        [None] * kept,
        None,
        None,
        [None] * drawn,
        *[None] * 7,
    )


torch.library.register_autograd(
    "throughtime::recurrence_backward", _differentiate_twice, setup_context=_save_twice, lib=_library
)
