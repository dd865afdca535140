"""How ONNX and Keras lay out a cell's weights, and how ours lie: the one place that knows.

ONNX has three cells, with gates in the orders i o f c (LSTM) and z r h (GRU), and peepholes in the order i o f. Its equations are
ours: h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}, i and f see c_{t−1}, o sees c_t, `linear_before_reset` is `reset_after`. Two cells of ours
are a case of one of its, since 1 − σ(a) = σ(−a), with all that makes a gate's a negated:

- coupled gates are an LSTM whose i is that of −f. (ONNX has `input_forget`, where f is 1 − i, which not every runtime computes.)
- an MGU is a GRU with the reset gate before, whose r is f and whose z is that of −f.

Keras has an LSTM's gates in our order, i f c o, a GRU's as ONNX has them, and its matrices turned.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.errors import InputError
from throughtime.spec import Parameters, Spec


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


def check(spec: Spec, has_projection: bool, **further: bool) -> None:
    """Refuse a cell, or what else is asked of it, that no node of ONNX's computes.

    Args:
        spec: What the cell's name says.
        has_projection: Whether it is projected.
        further: What else it would need, of which there is none.

    Raises:
        InputError: There is such a thing, which is named.
    """
    missing = {
        "layer normalisation": spec.is_normalised,
        "projection (proj_size)": has_projection,
        "zoneout": "zoneout_h" in spec.variants or "zoneout_c" in spec.variants,
        "recurrent dropout, which this layer has while it is in training": "recurrent_dropout" in spec.variants,
        **further,
    }
    found = [what for what, holds in missing.items() if holds]
    if found:
        raise InputError(
            f"{spec.name} can't be exported: ONNX's {node_of(spec).op} has no {found[0]}; leave it out, or use "
            "throughtime.stream or throughtime.export_c"
        )


class Arrays(NamedTuple):
    """A node's weights in each of D directions: (D, G·H, I), (D, G·H, H), (D, 2 G·H) and, of peepholes, (D, 3 H)."""

    W: Tensor
    R: Tensor
    B: Tensor | None
    P: Tensor | None


def arrays(directions: Sequence[Parameters], node: Node) -> Arrays:
    """Return a node's weights from those of each direction."""
    w, r, b, p = [], [], [], []
    for own in directions:
        w.append(arranged(own.weight_ih, node.gates))
        r.append(arranged(own.weight_hh, node.gates))
        if own.bias_ih is not None and own.bias_hh is not None:
            b.append(torch.cat([arranged(own.bias_ih, node.gates), arranged(own.bias_hh, node.gates)]))
        if own.weight_ch is not None:
            p.append(arranged(own.weight_ch, node.peepholes))
    return Arrays(torch.stack(w), torch.stack(r), torch.stack(b) if b else None, torch.stack(p) if p else None)


def attributes(node: Node, hidden_size: int, directions: Sequence[str]) -> dict[str, Any]:
    """Return a node's attributes; `directions` are "forward", "reverse" or both."""
    made: dict[str, Any] = {"hidden_size": hidden_size, "direction": directions[0]}
    if len(directions) > 1:
        made["direction"] = "bidirectional"
    if node.activation is not None:
        made["activations"] = [node.activation] * len(directions)
    if node.linear_before_reset is not None:
        made["linear_before_reset"] = node.linear_before_reset
    return made


def arranged(tensor: Tensor, blocks: tuple[Block, ...], count: int = 0) -> Tensor:
    """Return a matrix, or a vector, whose blocks of rows are those of another.

    Args:
        tensor: (G·H, ·) or (G·H,).
        blocks: For each block of the result, where it lies.
        count: G; 0 where the last block is one of those.

    Example:
        >>> arranged(torch.tensor([1.0, 2.0]), (Block(1), Block(0, is_negated=True)))
        tensor([ 2., -1.])
    """
    count = count or 1 + max(block.place for block in blocks)
    rows = int(tensor.shape[0]) // count  # where a graph is traced, sizes are tensors
    parts = [tensor[place * rows : (place + 1) * rows] for place in range(count)]
    return torch.cat([-parts[block.place] if block.is_negated else parts[block.place] for block in blocks])


class Origin(NamedTuple):
    """How somebody else's weights lie: of each of our gates, where it lies there, of so many; and of our peepholes, of three."""

    gates: tuple[Block, ...]
    gate_count: int
    peepholes: tuple[Block, ...] = ()


_FROM_Z_R_H = Origin((Block(1), Block(0), Block(2)), 3)
ONNX = {
    "RNN": Origin((Block(0),), 1),
    "LSTM": Origin((Block(0), Block(2), Block(3), Block(1)), 4, (Block(0), Block(2), Block(1))),
    "GRU": _FROM_Z_R_H,
}
# With `input_forget` an LSTM's f is 1 − i, whatever its own weights are.
ONNX_INPUT_FORGET = Origin((Block(0), Block(0, True), Block(3), Block(1)), 4, (Block(0), Block(0, True), Block(1)))
KERAS = {"rnn": Origin((Block(0),), 1), "lstm": Origin((Block(0), Block(1), Block(2), Block(3)), 4), "gru": _FROM_Z_R_H}


def parameters(arrays: Arrays, origin: Origin) -> list[Parameters]:
    """Return our parameters of each direction from a node's weights."""
    made = []
    for way in range(arrays.W.shape[0]):
        w, r = (arranged(matrix[way], origin.gates, origin.gate_count) for matrix in (arrays.W, arrays.R))
        own = Parameters(w, r)
        if arrays.B is not None:
            both = [arranged(half, origin.gates, origin.gate_count) for half in arrays.B[way].chunk(2)]
            own = own._replace(bias_ih=both[0], bias_hh=both[1])
        if arrays.P is not None:
            own = own._replace(weight_ch=arranged(arrays.P[way], origin.peepholes, 3))
        made.append(own)
    return made
