"""The recurrence as a torch operator, and the choice of who computes it.

`torch.ops.throughtime.recurrence` is one layer in one direction, for every cell. It has autograd rules (differentiable
twice and more), and a fake rule, so that `torch.compile` and `torch.export` see one opaque node whatever T is.
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

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from throughtime.cells import CELLS, Parameters, sequence
from throughtime.errors import unknown_name
from throughtime.kernels import cpu, torch_fused

Tensors = list[Tensor]

_library = torch.library.Library("throughtime", "DEF")
_library.define(
    "recurrence(Tensor input, Tensor[] initial, Tensor[] parameters, Tensor? lengths, Tensor? reset, "
    "str cell, bool reverse, bool keep, str backend) -> (Tensor output, Tensor[] final, Tensor[] saved)"
)
_library.define(
    "recurrence_backward(Tensor grad_output, Tensor[] grad_final, Tensor input, Tensor[] initial, Tensor[] parameters, "
    "Tensor output, Tensor[] saved, Tensor? lengths, Tensor? reset, str cell, bool reverse, bool needs_input, str backend) "
    "-> (Tensor grad_input, Tensor[] grad_initial, Tensor[] grad_parameters)"
)


def backends() -> dict[str, str]:
    """Say which backends there are and what each is.

    Example:
        >>> sorted(backends())
        ['native', 'reference', 'torch']
    """
    return {
        "native": cpu.description(),
        "reference": "the equations, step by step in plain torch",
        "torch": f"torch {torch.__version__}'s own fused call",
    }


@dataclass(frozen=True)
class Stack:
    """A stack of recurrent layers, apart from its tensors.

    Attributes:
        cell: Key in `CELLS`.
        num_layers: L.
        bidirectional: Whether each layer runs both ways.
        dropout: Probability with which an output of any layer but the last is dropped; 0 outside training.
        backend: "auto" or a key of `backends()`.
    """

    cell: str
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    backend: str = "auto"

    @property
    def directions(self) -> int:
        """1, or 2 when bidirectional."""
        return 2 if self.bidirectional else 1


def choose_backend(stack: Stack, input: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None) -> str:
    """Return the fastest backend that is right for the request, or the named one.

    Raises:
        InputError: The named backend is unknown.
        NotImplementedError: The named backend can't serve the request.
    """
    refusals = {"native": cpu.refusal(stack.cell, input), "torch": torch_fused.refusal(stack.cell, reset)}
    if stack.backend == "auto":
        if torch.compiler.is_compiling():
            # torch's fused calls don't trace with a dynamic T, and how much the kernels keep depends on the lengths.
            return "native" if lengths is None and not refusals["native"] else "reference"
        return next((name for name, refusal in refusals.items() if not refusal), "reference")
    if stack.backend not in backends():
        raise unknown_name("backend", stack.backend, ["auto", *backends()])
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack over padded input. The arguments have been checked.

    Args:
        stack: What to run.
        weights: Flat parameters of each layer and direction, in torch's order (layer 0, layer 0 reverse, layer 1, …).
        input: (T, B, I); its dtype is that of the results.
        state: (h_0,) or (h_0, c_0), each (L · directions, B, ·).
        lengths: (B,), or `None`.
        reset: (T, B), or `None`.

    Returns:
        The output (T, B, directions · P) and the final state, shaped like `state`.
    """
    backend = choose_backend(stack, input, lengths, reset)
    if backend != "torch":
        return _run_layers(stack, backend, weights, input, state, lengths, reset)
    weights = [_cast(row, input.dtype) for row in weights]
    if lengths is None:
        return torch_fused.run(stack.cell, input, state, weights, stack.num_layers, stack.dropout, stack.bidirectional)
    return _run_ragged_fused(stack, weights, input, state, lengths)


def run_stack_packed(
    stack: Stack, weights: list[Tensors], packed: PackedSequence, state: tuple[Tensor, ...]
) -> tuple[PackedSequence, tuple[Tensor, ...]]:
    """Run a stack over a PackedSequence; `state` is in the caller's order of rows, and so is the final state."""
    backend = choose_backend(stack, packed.data, packed.batch_sizes)
    if backend == "torch":
        weights = [_cast(row, packed.data.dtype) for row in weights]
        return torch_fused.run_packed(
            stack.cell, packed, state, weights, stack.num_layers, stack.dropout, stack.bidirectional
        )
    input, lengths = pad_packed_sequence(packed)
    output, final = _run_layers(stack, backend, weights, input, state, lengths.to(input.device), None)
    if packed.sorted_indices is None:
        return pack_padded_sequence(output, lengths), final
    in_order = output.index_select(1, packed.sorted_indices)
    data = pack_padded_sequence(in_order, lengths[packed.sorted_indices.cpu()]).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), final


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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack layer by layer and direction by direction over the operator."""
    finals: list[Tensors] = []
    for layer in range(stack.num_layers):
        outputs: Tensors = []
        for direction in range(stack.directions):
            row = layer * stack.directions + direction
            initial = [s[row] for s in state]
            keep = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *initial, *weights[row]))
            output, final, _ = torch.ops.throughtime.recurrence(
                input, initial, weights[row], lengths, reset, stack.cell, direction == 1, keep, backend
            )
            outputs.append(output)
            finals.append(final)
        input = torch.cat(outputs, dim=2) if stack.bidirectional else outputs[0]
        if layer < stack.num_layers - 1:
            input = dropout(input, stack.dropout)
    return input, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))


# The operator -------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "recurrence", "CompositeExplicitAutograd")
def _recurrence(
    input: Tensor,
    initial: Tensors,
    parameters: Tensors,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensors, Tensors]:
    """Run one layer in one direction. `keep` asks for what the backward pass needs; without it `saved` is empty."""
    if backend == "native":
        return cpu.forward(cell, input, initial, parameters, lengths, reset, reverse, keep)
    rounded = Parameters.from_list(_cast(parameters, input.dtype))
    result = sequence.forward(CELLS[cell], input, tuple(initial), rounded, lengths, reset, reverse)
    saved = [torch.stack(field) for field in zip(*result.saved, strict=True)] if keep else []
    # An operator's outputs must not alias its inputs, and an all-empty batch would hand the initial state through.
    return result.outputs, [s.clone() for s in result.final_state], saved


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
    cell: str,
    reverse: bool,
    needs_input: bool,
    backend: str,
) -> tuple[Tensor, Tensors, Tensors]:
    """Backpropagate through one layer in one direction: gradients for input (none if not needed), state and parameters."""
    if backend == "native":
        grad_input, grad_initial, grad_parameters = cpu.backward(
            *(cell, grad_output, grad_final, input, initial, parameters, output, saved),
            *(lengths, reset, reverse, needs_input),
        )
        return input.new_empty(0) if grad_input is None else grad_input, grad_initial, grad_parameters
    kind = CELLS[cell]
    steps = [kind.saved(*fields) for fields in zip(*saved, strict=True)]
    rounded = Parameters.from_list(_cast(parameters, input.dtype))
    gradient = sequence.backward(kind, grad_output, tuple(grad_final), steps, rounded, lengths, reset, reverse)
    grad_input = gradient.inputs if needs_input else input.new_empty(0)
    grad_parameters = _cast(gradient.parameters.to_list(), parameters[0].dtype)
    return grad_input, [g.clone() for g in gradient.initial_state], grad_parameters


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return [tensor.to(dtype) for tensor in tensors]


@torch.library.register_fake("throughtime::recurrence", lib=_library)
def _(input, initial, parameters, lengths, reset, cell, reverse, keep, backend):
    # One step of the equations on fake tensors tells every shape and dtype.
    state, saved = CELLS[cell].step(input[0], tuple(initial), Parameters.from_list(_cast(parameters, input.dtype)))
    steps, batch, _ = input.shape
    output = state[0].new_empty((steps, *state[0].shape))
    final = [torch.empty_like(s) for s in state]
    if not keep:
        return output, final, []
    if backend == "native":
        widths = cpu.saved_widths(cell, parameters[1].shape[0] // CELLS[cell].gates)
        is_ragged = lengths is not None and widths
        rows = torch.library.get_ctx().new_dynamic_size() if is_ragged else steps * batch
        return output, final, [input.new_empty((rows, width)) for width in widths]
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
    cell,
    reverse,
    needs_input,
    backend,
):
    grad_input = torch.empty_like(input) if needs_input else input.new_empty(0)
    return grad_input, [torch.empty_like(s) for s in initial], [torch.empty_like(p) for p in parameters]


def _save(ctx, inputs, output) -> None:
    input, initial, parameters, lengths, reset, cell, reverse, _, backend = inputs
    outputs, _, saved = output
    ctx.counts = len(initial), len(parameters)
    ctx.rest = cell, reverse, input.requires_grad, backend
    ctx.save_for_backward(input, *initial, *parameters, lengths, reset, outputs, *saved)


def _differentiate(ctx, grad_output, grad_final, grad_saved):
    states, weights = ctx.counts
    input, *tensors = ctx.saved_tensors
    initial, tensors = tensors[:states], tensors[states:]
    parameters, (lengths, reset, output, *saved) = tensors[:weights], tensors[weights:]
    grad_input, grad_initial, grad_parameters = torch.ops.throughtime.recurrence_backward(
        grad_output, list(grad_final), input, initial, parameters, output, saved, lengths, reset, *ctx.rest
    )
    needs_input = ctx.rest[2]
    return grad_input if needs_input else None, grad_initial, grad_parameters, None, None, None, None, None, None


torch.library.register_autograd("throughtime::recurrence", _differentiate, setup_context=_save, lib=_library)


def _save_twice(ctx, inputs, output) -> None:
    grad_output, grad_final, input, initial, parameters, _, saved, lengths, reset, cell, reverse, needs_input, _ = (
        inputs
    )
    ctx.counts = len(grad_final), len(saved)
    ctx.rest = cell, reverse, needs_input
    ctx.save_for_backward(grad_output, *grad_final, input, *initial, *parameters, lengths, reset)


def _differentiate_twice(ctx, grad_grad_input, grad_grad_initial, grad_grad_parameters):
    """Differentiate the backward pass by sending autograd through the reference, which is plain torch both ways."""
    states, kept = ctx.counts
    cell, reverse, needs_input = ctx.rest
    *tensors, lengths, reset = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        grad_output, *others = leaves
        grad_final, others = others[:states], others[states:]
        input, *others = others
        initial, parameters = others[:states], Parameters.from_list(_cast(others[states:], input.dtype))
        kind = CELLS[cell]
        result = sequence.forward(kind, input, tuple(initial), parameters, lengths, reset, reverse)
        gradient = sequence.backward(
            kind, grad_output, tuple(grad_final), result.saved, parameters, lengths, reset, reverse
        )
        grad_parameters = _cast(gradient.parameters.to_list(), tensors[-1].dtype)
    results = [*gradient.initial_state, *grad_parameters]
    weights = [*grad_grad_initial, *grad_grad_parameters]
    if needs_input:
        results, weights = [gradient.inputs, *results], [grad_grad_input, *weights]
    grads = torch.autograd.grad(
        results,
        leaves,
        weights,
        allow_unused=True,
        create_graph=torch.is_grad_enabled(),
    )
    grad_output, *grads = grads
    grad_final, (input, *grads) = grads[:states], grads[states:]
    initial, parameters = grads[:states], grads[states:]
    return grad_output, grad_final, input, initial, parameters, None, [None] * kept, *[None] * 6


torch.library.register_autograd(
    "throughtime::recurrence_backward", _differentiate_twice, setup_context=_save_twice, lib=_library
)
