"""torch's own fused call (oneDNN on the CPU, cuDNN on a GPU) as a backend: whole stacks, padded or packed."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_CALLS = {"rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "lstm": torch.lstm, "gru": torch.gru}


def refusal(cell: str, reset: Tensor | None) -> str | None:
    """Return why torch can't express a request, or `None` where it can."""
    base, *variants = cell.split("+")
    if base not in _CALLS:
        return f"it has no {base} cell"
    if variants:
        return f"it has no {', '.join(variants).replace('_', ' ')}"
    if reset is not None:
        return "it has no resets"
    return None


def run(
    cell: str,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: list[list[Tensor]],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack over padded input (T, B, I): return the output (T, B, directions · P) and the final state."""
    has_biases = len(weights[0]) > 3
    output, *final = _CALLS[cell](
        input,
        _as_torch_wants(state),
        _flat(weights),
        has_biases,
        num_layers,
        dropout,
        dropout > 0,
        bidirectional,
        False,
    )
    return output, tuple(final)


def run_packed(
    cell: str,
    packed: PackedSequence,
    state: tuple[Tensor, ...],
    weights: list[list[Tensor]],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[PackedSequence, tuple[Tensor, ...]]:
    """Run a stack over a PackedSequence; states are in the caller's order of rows, not the packed one."""
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if sorted_indices is not None:
        state = tuple(s.index_select(1, sorted_indices) for s in state)
    has_biases = len(weights[0]) > 3
    output, *final = _CALLS[cell](
        data,
        batch_sizes,
        _as_torch_wants(state),
        _flat(weights),
        has_biases,
        num_layers,
        dropout,
        dropout > 0,
        bidirectional,
    )
    if unsorted_indices is not None:
        final = [s.index_select(1, unsorted_indices) for s in final]
    return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), tuple(final)


def _as_torch_wants(state: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return state if len(state) == 2 else state[0]


def _flat(weights: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for row in weights for tensor in row]
