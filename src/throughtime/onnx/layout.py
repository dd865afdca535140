"""How ONNX and Keras lay out a cell's weights, and how ours lie: the one place that knows.

ONNX has three cells, with gates in the orders i o f c (LSTM) and z r h (GRU), and peepholes in the order i o f. Its equations are
ours: h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}, i and f see c_{t−1}, o sees c_t, `linear_before_reset` is `reset_after`. Two cells of ours
are a case of one of its, since 1 − σ(a) = σ(−a), with all that makes a gate's a negated:

- coupled gates are an LSTM whose i is that of −f. (ONNX has `input_forget`, where f is 1 − i, which not every runtime computes.)
- an MGU is a GRU with the reset gate before, whose r is f and whose z is that of −f.

Keras has an LSTM's gates in our order, i f c o, a GRU's as ONNX has them, and its matrices turned.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from throughtime.spec import Spec


class Block(NamedTuple):
    """A gate's rows in a matrix of all gates: which block of rows, and whether with the other sign."""

    place: int
    is_negated: bool = False


class Node(NamedTuple):
    """What ONNX's node is that computes a cell.

    Attributes:
        op: "LSTM", "GRU" or "RNN".
        gates: Of each of its gates, in its order, where ours lies.
        peepholes: The same of its peepholes.
        activation: The nonlinearity of an RNN.
        linear_before_reset: The attribute of a GRU.
    """

    op: str
    gates: tuple[Block, ...]
    peepholes: tuple[Block, ...] = ()
    activation: str | None = None
    linear_before_reset: int | None = None


_I_O_F_C = (Block(0), Block(3), Block(1), Block(2))
_I_O_F = (Block(0), Block(2), Block(1))
_Z_R_H = (Block(1), Block(0), Block(2))
_NODES = {
    "rnn_tanh": Node("RNN", (Block(0),), activation="Tanh"),
    "rnn_relu": Node("RNN", (Block(0),), activation="Relu"),
    "lstm": Node("LSTM", _I_O_F_C, _I_O_F),
    "gru": Node("GRU", _Z_R_H, linear_before_reset=1),
    "gru_reset_before": Node("GRU", _Z_R_H, linear_before_reset=0),
    "mgu": Node("GRU", (Block(0, True), Block(0), Block(1)), linear_before_reset=0),
}
_COUPLED = Node("LSTM", (Block(0, True), Block(2), Block(0), Block(1)), peepholes=(Block(0, True), Block(1), Block(0)))


def node_of(spec: Spec) -> Node:
    """Return ONNX's node for a cell, whose variants other than coupled gates and peepholes it doesn't know.

    Example:
        >>> from throughtime import spec
        >>> node_of(spec.read("gru")).linear_before_reset
        1
    """
    return _COUPLED if spec.is_coupled else _NODES[spec.base]


def arranged(tensor: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """Return a matrix, or a vector, whose blocks of rows are those of another.

    Args:
        tensor: (G·H, ·) or (G·H,).
        blocks: For each block of the result, where it lies.

    Example:
        >>> arranged(torch.tensor([1.0, 2.0]), (Block(1), Block(0, is_negated=True)))
        tensor([ 2., -1.])
    """
    count = 1 + max(block.place for block in blocks)
    rows = int(tensor.shape[0]) // count  # where a graph is traced, sizes are tensors
    parts = [tensor[place * rows : (place + 1) * rows] for place in range(count)]
    return torch.cat([-parts[block.place] if block.is_negated else parts[block.place] for block in blocks])
