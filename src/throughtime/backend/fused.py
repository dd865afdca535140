"""torch's own fused call (oneDNN on the CPU, cuDNN on a GPU) as the backend "torch": whole stacks, padded or packed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from throughtime.request import Request, Sequences, Stack
from throughtime.spec import Parameters

_CALLS = {"rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "lstm": torch.lstm, "gru": torch.gru}


def refusal(request: Request) -> str | None:
    """Return why torch can't express a request, or `None` where it can."""
    said = request.spec
    if said.base not in _CALLS:
        return f"it has no {said.base} cell"
    if said.variants:
        return f"it has no {', '.join(said.variants).replace('_', ' ')}"
    if request.reset is not None:
        return "it has no resets"
    if request.recompute_every:
        return "it keeps all that its backward pass needs"
    return None


def forward(
    stack: Stack, weights: Sequence[Parameters], sequences: Sequences, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack: return the output, padded or packed as the input is, and the final state, shaped like the initial one.

    Rows of a packed call's state are in the order of the packed ones.
    """
    if sequences.lengths is None:
        return _call(stack, weights, sequences.input, sequences.batch_sizes, state)
    return _forward_ragged(stack, weights, sequences.input, sequences.lengths, state)


def _forward_ragged(
    stack: Stack, weights: Sequence[Parameters], input: Tensor, lengths: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Serve `lengths` by packing. An empty row can't be packed: it travels as one step of zeros, put right afterwards."""
    is_empty = lengths == 0
    input = torch.where(is_empty[:, None], 0, input)
    packed = pack_padded_sequence(input, lengths.clamp(min=1).cpu(), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert back is not None
    rows = tuple(s.index_select(1, order) for s in state)
    output, final = _call(stack, weights, packed.data, packed.batch_sizes, rows)
    final = tuple(s.index_select(1, back) for s in final)
    output, _ = pad_packed_sequence(packed._replace(data=output), total_length=input.shape[0])
    keep = is_empty[:, None]
    return torch.where(keep, 0, output), tuple(torch.where(keep, s, f) for s, f in zip(state, final, strict=True))


def _call(
    stack: Stack, weights: Sequence[Parameters], input: Tensor, batch_sizes: Tensor | None, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    flat = [p.to(input.dtype) for row in weights for p in row.to_list()]
    has_biases = weights[0].bias_ih is not None
    options = has_biases, stack.num_layers, stack.dropout, stack.dropout > 0, stack.bidirectional
    initial, call = (state if len(state) == 2 else state[0]), _CALLS[stack.spec.base]
    if batch_sizes is None:
        output, *final = call(input, initial, flat, *options, False)
    else:
        output, *final = call(input, batch_sizes, initial, flat, *options)
    return output, tuple(final)
