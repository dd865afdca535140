"""Layers with the weights of others: of ONNX's RNN, LSTM and GRU nodes, and of Keras' layers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.errors import InputError, unknown_name
from throughtime.layers import GRU, LSTM, RNN, Recurrent
from throughtime.onnx import layout
from throughtime.onnx.packages import package

_NEEDED_BY = "throughtime.from_onnx"
_OPS = ("RNN", "LSTM", "GRU")
_DTYPES = (torch.float32, torch.float64, torch.float16)
# What arranges weights, and makes no more of a file than it holds: a stranger's file may ask for anything.
_ARRANGING = {
    *("Cast", "Concat", "Constant", "DequantizeLinear", "Flatten", "Gather", "Identity", "Mul"),
    *("Neg", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}


class Reversed(nn.Module):
    """A layer that runs from each row's last step to its first: its input's steps and its output's are turned round.

    Args:
        layer: One of a single direction.

    Example:
        >>> import torch, throughtime
        >>> layer = Reversed(throughtime.GRU(5, 8))
        >>> output, h = layer(torch.randn(20, 3, 5), lengths=torch.tensor([20, 0, 7]))
        >>> output.shape
        torch.Size([20, 3, 8])
    """

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the output, of which step t has read steps t, t + 1, …, and the state at each row's first step."""
        if input.dim() != 3:
            raise ValueError(f"input has {input.dim()} dimensions; expected 3, (T, B, I), or (B, T, I) if batch_first")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, dtype=torch.int64, device=input.device)
        output, final = self.layer(self._turned(input, lengths), hx, lengths=lengths)
        return self._turned(output, lengths), final

    def _turned(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        axis = 1 if self.layer.batch_first else 0
        if lengths is None:
            return x.flip(axis)
        steps = torch.arange(x.shape[axis], device=x.device)[:, None]
        places = torch.where(steps < lengths, lengths - 1 - steps, steps)
        places = places.T if self.layer.batch_first else places
        return x.gather(axis, places[:, :, None].expand(x.shape))


class FromOnnx(NamedTuple):
    """What a node of ONNX's is.

    Attributes:
        layer: What computes the same: a layer, or a `Reversed` one of a node whose direction is "reverse".
        hx: The state that the node begins with where the file holds one, as the layer takes it; else `None`.
        lengths: Steps of each row (B,) where the file holds them; else `None`.
    """

    layer: Any
    hx: Any
    lengths: Tensor | None


def from_onnx(model: Any) -> dict[str, FromOnnx]:
    """Return a layer for each RNN, LSTM and GRU node of an ONNX model, by the node's name, or its first output's where it has none.

    Weights may be initialisers, constants, or those as other nodes arrange them (Concat, Slice, Transpose, …). What the node is
    given as lengths or a state by other nodes, or by who runs the model, is yours to give to the layer. Graphs within nodes (If,
    Loop, Scan) and functions aren't read.

    Args:
        model: A path, or an `onnx.ModelProto`.

    Raises:
        InputError: There is no such file, model or node; a node's weights hang on an input, or don't fit; it clips, or has other
            nonlinearities than a layer; or the extra `throughtime[onnx]` isn't there.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.GRU(5, 8)
        >>> done = throughtime.export_onnx(layer, "gru.onnx")
        >>> ((name, found),) = throughtime.from_onnx("gru.onnx").items()
        >>> name, found.layer, torch.equal(found.layer.weight_hh_l0, layer.weight_hh_l0)
        ('all_0', GRU(5, 8), True)
    """
    onnx, made = package("onnx", _NEEDED_BY), model
    if isinstance(model, str | Path):
        made = _load(onnx, Path(model))
    elif not isinstance(model, onnx.ModelProto):
        raise InputError(f"model is a {type(model).__name__}; expected a path or an onnx.ModelProto")
    nodes = [node for node in made.graph.node if node.op_type in _OPS and node.domain in ("", "ai.onnx")]
    if not nodes:
        raise InputError("the ONNX model has no RNN, LSTM or GRU node in its graph; expected one at least")
    constants, found = _Constants(onnx, made), {}
    for node in nodes:
        name = node.name or next((output for output in node.output if output), node.op_type)
        if name in found:
            raise InputError(f"two nodes of the ONNX model are called {name!r}; expected a name of its own for each")
        found[name] = _Node(onnx, node, name, constants).read()
    return found


def _load(onnx: Any, path: Path) -> Any:
    try:
        return onnx.load(str(path))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # protobuf's own
        raise InputError(f"{path} is no ONNX model: {_first_line(error)}") from None


class _Constants:
    """The values of a graph that hang on no input."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.model = onnx, model
        graph = model.graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {output: node for node in graph.node for output in node.output if output}
        self.known: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        """Return an array, or `None` where it hangs on an input."""
        waiting = [name]
        while waiting:  # depth first, without recursion: a graph may be a long chain
            last = waiting[-1]
            if last in self.known:
                waiting.pop()
                continue
            if last in self.tensors:
                try:
                    self.known[last] = self.onnx.numpy_helper.to_array(self.tensors[last])
                except Exception as error:
                    raise InputError(f"the ONNX model's tensor {last!r} can't be read: {_first_line(error)}") from None
                continue
            node = self.makers.get(last)
            if node is None:
                self.known[last] = None
                continue
            before = [given for given in node.input if given]
            missing = [given for given in before if given not in self.known]
            if missing:
                if missing[0] in waiting:
                    raise InputError(f"the ONNX model's node {node.name or node.op_type!r} hangs on its own output")
                waiting.append(missing[0])
                continue
            self._compute(node, before)
        return self.known[name]

    def _compute(self, node: Any, before: list[str]) -> None:
        values = {given: self.known[given] for given in before}
        outputs = [output for output in node.output if output]
        is_known = node.op_type in _ARRANGING and not any(value is None for value in values.values())
        if not is_known or (node.domain not in ("", "ai.onnx")):
            self.known |= dict.fromkeys(outputs)
            return
        evaluator = package("onnx.reference", _NEEDED_BY).ReferenceEvaluator
        opsets = {opset.domain: opset.version for opset in self.model.opset_import}
        try:
            made = evaluator(node, opsets=opsets).run(None, values)
        except Exception as error:
            raise InputError(
                f"the ONNX model's node {node.name or outputs[0]!r} ({node.op_type}) can't be computed: {_first_line(error)}"
            ) from None
        self.known |= dict(zip(outputs, made, strict=False))


class _Node:
    """One node, and what it says."""

    def __init__(self, onnx: Any, node: Any, name: str, constants: _Constants) -> None:
        self.node, self.constants = node, constants
        self.called = f"the {node.op_type} node {name!r}"
        self.said = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        self.direction = _text(self.said.get("direction", "forward"))

    def read(self) -> FromOnnx:
        """Return the layer."""
        if self.direction not in ("forward", "reverse", "bidirectional"):
            raise InputError(
                f"{self.called} has direction {self.direction!r}; expected forward, reverse or bidirectional"
            )
        if "clip" in self.said:
            raise InputError(
                f"{self.called} clips at {self.said['clip']:g}; expected one that doesn't, as layers don't"
            )
        ways = 2 if self.direction == "bidirectional" else 1
        make, options = self._kind(ways)
        is_coupled = self.node.op_type == "LSTM" and bool(self.said.get("input_forget"))
        origin = layout.ONNX_INPUT_FORGET if is_coupled else layout.ONNX[self.node.op_type]
        arrays = self._arrays(ways, origin)
        is_batch_first, p = bool(self.said.get("layout")), arrays.P
        options |= {"bias": arrays.B is not None, "bidirectional": ways > 1, "batch_first": is_batch_first}
        options |= {} if p is None else {"peepholes": True}
        layer = make(arrays.W.shape[-1], arrays.R.shape[-1], dtype=arrays.W.dtype, **options)
        _fill(layer, layout.parameters(arrays, origin))
        lengths = self._known(4)
        made = Reversed(layer) if self.direction == "reverse" else layer
        return FromOnnx(made, self._state(layer), None if lengths is None else _tensor(lengths).long())

    def _kind(self, ways: int) -> tuple[Callable[..., Recurrent], dict[str, Any]]:
        """Return the layer's class and what tells its cell; refuse nonlinearities that it doesn't have."""
        op = self.node.op_type
        usual = {"RNN": ["Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}[op]
        given = [_text(name) for name in self.said.get("activations", usual * ways)]
        is_known = given == usual * ways or (op == "RNN" and given == ["Relu"] * ways)
        if not is_known:
            expected = ", ".join(usual) + (" or Relu" if op == "RNN" else "")
            raise InputError(f"{self.called} has the activations {', '.join(given)}; expected {expected}, each way")
        if op == "RNN":
            return RNN, {"nonlinearity": given[0].lower()}
        return (GRU, {"reset_after": bool(self.said.get("linear_before_reset"))}) if op == "GRU" else (LSTM, {})

    def _arrays(self, ways: int, origin: layout.Origin) -> layout.Arrays:
        """Return the weights, whose shapes have been checked."""
        w, r = self._weight(1, "W"), self._weight(2, "R")
        if w is None or r is None or w.dim() != 3 or r.dim() != 3:
            raise InputError(f"{self.called} has no weights (D, G·H, ·); expected W and R")
        b, p = self._weight(3, "B"), self._weight(7, "P") if self.node.op_type == "LSTM" else None
        hidden, rows = r.shape[-1], origin.gate_count * r.shape[-1]
        expected = {"W": (ways, rows, w.shape[-1]), "R": (ways, rows, hidden), "B": (ways, 2 * rows)}
        expected["P"] = (ways, 3 * hidden)
        made = layout.Arrays(w, r, b, p)
        for name, array in made._asdict().items():
            if array is not None and (tuple(array.shape) != expected[name] or array.dtype != w.dtype):
                raise InputError(
                    f"{self.called} has {name} {tuple(array.shape)}, {array.dtype}; expected {expected[name]}, {w.dtype}"
                )
        if self.said.get("hidden_size", hidden) != hidden:
            raise InputError(f"{self.called} has hidden_size {self.said['hidden_size']}; expected R's, {hidden}")
        return made

    def _known(self, place: int) -> Any:
        """Return what the file holds of an input, or `None`."""
        inputs = self.node.input
        return self.constants.value(inputs[place]) if place < len(inputs) and inputs[place] else None

    def _weight(self, place: int, name: str) -> Tensor | None:
        inputs = self.node.input
        if place >= len(inputs) or not inputs[place]:
            return None
        value = self._known(place)
        if value is None:
            raise InputError(
                f"{self.called} has {name} = {inputs[place]!r}, which hangs on an input of the model; expected weights in it"
            )
        tensor = _tensor(value)
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{self.called} has {name} of {tensor.dtype}; expected float32, float64 or float16")
        return tensor

    def _state(self, layer: Recurrent) -> Any:
        """Return the state that the file holds, (D, B, H) whatever the node's layout is."""
        places = (5, 6)[: len(layer._spec.states)]
        known = [self._known(place) for place in places]
        if all(part is None for part in known):
            return None
        for place, part in zip(places, known, strict=True):
            if part is None and place < len(self.node.input) and self.node.input[place]:
                raise InputError(
                    f"{self.called} holds one part of its state and is given the other; expected both or none"
                )
        zeros = torch.zeros_like(_tensor(next(part for part in known if part is not None)))
        parts = [zeros if part is None else _tensor(part) for part in known]
        parts = [part.transpose(0, 1).contiguous() if self.said.get("layout") else part for part in parts]
        return tuple(parts) if len(parts) > 1 else parts[0]


def from_keras(
    cell: str, weights: Sequence[Any], *backward: Any, reset_after: bool = True, relu: bool = False
) -> Recurrent:
    """Return a layer with the weights of a Keras layer, as `layer.get_weights()` gives them.

    Keras' matrices are turned, (I, G·H) and (H, G·H), its LSTM has the gates i f c o and one bias, its GRU z r h and, with
    `reset_after`, two. The layer is `batch_first`, as Keras' are; its output has every step, as with `return_sequences=True`.

    Args:
        cell: "rnn" (Keras' SimpleRNN), "lstm" or "gru".
        weights: [kernel, recurrent_kernel] or [kernel, recurrent_kernel, bias]. Those of a `Bidirectional` are six arrays, or four
            without biases: the forward layer's, then the backward one's.
        backward: The backward layer's weights, where they are apart: one list more, for a layer of both directions.
        reset_after: Of a GRU, as in Keras.
        relu: Of an RNN, whether its activation is relu instead of tanh.

    Raises:
        InputError: There is no such cell, or the arrays' number or shapes don't fit.

    Example:
        >>> import numpy, throughtime
        >>> kernel, recurrent_kernel = numpy.zeros((5, 4 * 8), "float32"), numpy.zeros((8, 4 * 8), "float32")
        >>> throughtime.from_keras("lstm", [kernel, recurrent_kernel, numpy.zeros(4 * 8, "float32")])
        LSTM(5, 8, batch_first=True)
    """
    if cell not in layout.KERAS:
        raise unknown_name("cell", cell, list(layout.KERAS))
    if len(backward) > 1:
        raise InputError(f"{len(backward) + 1} lists of weights were given; expected one, or two for both directions")
    directions = [list(weights), *map(list, backward)]
    if not backward and len(weights) in (4, 6):
        half = len(weights) // 2
        directions = [list(weights[:half]), list(weights[half:])]
    origin = layout.KERAS[cell]
    has_two = cell == "gru" and reset_after
    each = [_of_keras(own, origin.gate_count, has_two) for own in directions]
    if len({tuple(None if a is None else (a.shape, a.dtype) for a in one) for one in each}) > 1:
        raise InputError("the weights of the two directions differ in shape; expected the same")
    w, r = torch.stack([own[0] for own in each]), torch.stack([own[1] for own in each])
    b = [one[2] for one in each if one[2] is not None]
    joined = layout.Arrays(w, r, torch.stack(b) if b else None, None)
    options: dict[str, Any] = {"bias": joined.B is not None, "bidirectional": len(each) > 1, "batch_first": True}
    options |= {"reset_after": reset_after} if cell == "gru" else {}
    options |= {"nonlinearity": "relu"} if cell == "rnn" and relu else {}
    make: Callable[..., Recurrent] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}[cell]
    layer = make(joined.W.shape[-1], joined.R.shape[-1], dtype=joined.W.dtype, **options)
    _fill(layer, layout.parameters(joined, origin))
    return layer


def _of_keras(weights: list[Any], count: int, has_two: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return W, R and B of one direction, turned as ONNX's are."""
    if len(weights) not in (2, 3):
        raise InputError(f"there are {len(weights)} arrays; expected [kernel, recurrent_kernel] or those and a bias")
    tensors = [_tensor(np.asarray(array)) for array in weights]
    hidden = tensors[1].shape[0] if tensors[1].dim() == 2 else 0
    inputs, rows = (tensors[0].shape[0] if tensors[0].dim() else 0), count * hidden
    expected = [(inputs, rows), (hidden, rows), (2, rows) if has_two else (rows,)]
    for name, tensor, shape in zip(("kernel", "recurrent_kernel", "bias"), tensors, expected, strict=False):
        if tuple(tensor.shape) != shape or not hidden:
            raise InputError(f"the {name} has shape {tuple(tensor.shape)}; expected {shape}, for {count} gates")
        if tensor.dtype not in _DTYPES or tensor.dtype != tensors[0].dtype:
            raise InputError(f"the {name} is {tensor.dtype}; expected float32, float64 or float16, all the same")
    kernel, recurrent, *bias = tensors
    b = None
    if bias:
        b = bias[0].flatten() if has_two else torch.cat([bias[0], torch.zeros_like(bias[0])])
    return kernel.T, recurrent.T, b


def _fill(layer: Recurrent, weights: Sequence[layout.Parameters]) -> None:
    """Give a layer of one layer its parameters."""
    with torch.no_grad():
        for names, own in zip(layer._names, weights, strict=True):
            for name, tensor in own.there().items():
                getattr(layer, names[name]).copy_(tensor)


def _tensor(array: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise InputError(f"an array is of {np.asarray(array).dtype}; expected numbers that torch has") from error


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
