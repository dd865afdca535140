"""The same quantities by torch.autograd, one loss at a time: slow, and with nothing in common with the instruments' own sweep."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from throughtime.cells import Parameters, find, sequence


class Unrolled(NamedTuple):
    """A stack unrolled in autograd's graph."""

    outputs: Tensor  # (T, B, directions · P)
    states: list[list[tuple[Tensor, ...]]]  # of each lane, in order of t: the state that the next step reads
    parameters: list[Parameters]  # of each lane, leaves


def unroll(
    cell: str, layer: nn.Module, x: Tensor, lengths: Tensor | None = None, reset: Tensor | None = None
) -> Unrolled:
    """Run a stack with a copy of each step's state that autograd can be asked about, h and c apart."""
    lanes, parameters = [], []
    directions = 2 if layer.bidirectional else 1
    for row, weights in enumerate(layer.all_weights):
        if row % directions == 0:
            outputs = []
        leaves = Parameters.from_list(
            [w.detach().clone().requires_grad_() for w in weights], find(cell).spec.variant_parameters
        )
        states: list[tuple[Tensor, ...]] = []

        def step(*arguments: Any, states: list = states) -> Any:
            after, saved = find(cell).step(*arguments)
            after = tuple(
                part * 1 for part in after
            )  # a variable of its own: c's gradient leaves out the way through h
            states.append(after)
            return after, saved

        batch, hidden = x.shape[1], leaves.weight_hh.shape[0] // find(cell).spec.gates
        widths = [leaves.weight_hh.shape[1], hidden][: len(find(cell).spec.states)]
        initial = tuple(x.new_zeros(batch, width) for width in widths)
        reverse = row % directions == 1
        result = sequence.forward(find(cell)._replace(step=step), x, initial, leaves, lengths, reset, reverse)
        outputs.append(result.outputs)
        lanes.append(states[::-1] if reverse else states)
        parameters.append(leaves)
        if row % directions == directions - 1:
            x = torch.cat(outputs, dim=2)
    return Unrolled(x, lanes, parameters)


def state_gradients(unrolled: Unrolled, grad_outputs: Tensor, loss: int) -> list[list[tuple[Tensor, ...]]]:
    """Return ∂L_s/∂s_t of one loss for each lane and step, zeros where it does not reach."""
    flat = [part for states in unrolled.states for state in states for part in state]
    found = torch.autograd.grad(
        (unrolled.outputs[loss] * grad_outputs[loss]).sum(), flat, retain_graph=True, allow_unused=True
    )
    gradients = iter(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(flat, found, strict=True))
    return [[tuple(next(gradients) for _ in state) for state in states] for states in unrolled.states]


def weight_gradients(unrolled: Unrolled, grad_outputs: Tensor, losses: list[int]) -> list[list[Tensor]]:
    """Return the gradient of the weights of each lane for a sum of losses."""
    flat = [w for parameters in unrolled.parameters for w in parameters.to_list()]
    total = sum((unrolled.outputs[s] * grad_outputs[s]).sum() for s in losses)
    found = iter(torch.autograd.grad(total, flat, retain_graph=True))
    return [[next(found) for _ in parameters.to_list()] for parameters in unrolled.parameters]
