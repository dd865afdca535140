"""ONNX Runtime's part in `benchmarks/step.py`: a recurrent layer whose states come in and go out at every step."""

# pyright: reportMissingImports=false

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from throughtime import spec
from throughtime.onnx import layout

Floats = NDArray[np.float32]
Begin = Callable[[], Callable[[Floats], Floats]]  # steps from a fresh state


def contestants(kind: str, layer: nn.RNNBase) -> list[tuple[str, Begin]]:
    """Return its two ways, by name."""
    return [("onnxruntime, run", _by_run(kind, layer)), ("onnxruntime, io_binding", _bound(kind, layer))]


def _session(kind: str, layer: nn.RNNBase) -> tuple[Any, dict[str, list[int]]]:
    """Return a session of one thread whose states come in and go out, and their shapes."""
    states = ["h", "c"] if kind == "lstm" else ["h"]
    node, nodes, tensors = layout.node_of(spec.read("rnn_tanh" if kind == "rnn" else kind)), [], []
    for number, parameters in enumerate(layer.all_weights):
        w, r, b_ih, b_hh = (layout.arranged(p.detach(), node.gates) for p in parameters)
        named = {f"W{number}": w[None], f"R{number}": r[None], f"B{number}": torch.cat([b_ih, b_hh])[None]}
        tensors += [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in named.items()]
        inputs = [f"Y{number - 1}" if number else "X", *named, "", *(f"{s}{number}" for s in states)]
        form: dict[str, Any] = {"linear_before_reset": 1} if kind == "gru" else {}
        outputs = [f"raw{number}", *(f"{s}{number}_out" for s in states)]
        nodes.append(helper.make_node(kind.upper(), inputs, outputs, hidden_size=layer.hidden_size, **form))
        nodes.append(helper.make_node("Squeeze", [f"raw{number}", "axis"], [f"Y{number}"]))
    tensors.append(numpy_helper.from_array(np.array([1]), "axis"))
    width, count = layer.hidden_size, len(layer.all_weights)
    sizes = {f"{s}{n}": [1, 1, width] for n in range(count) for s in states}

    def value(name: str, shape: Sequence[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "step",
        [value("X", [1, 1, layer.input_size]), *(value(*pair) for pair in sizes.items())],
        [value(f"Y{count - 1}", [1, 1, width]), *(value(f"{name}_out", shape) for name, shape in sizes.items())],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), sizes


def _by_run(kind: str, layer: nn.RNNBase) -> Begin:
    """Hand the states on by `run`."""
    session, sizes = _session(kind, layer)

    def begin() -> Callable[[Floats], Floats]:
        states = {name: np.zeros(shape, np.float32) for name, shape in sizes.items()}

        def step(x: Floats) -> Floats:
            output, *after = session.run(None, {"X": x[None, None], **states})
            states.update(zip(states, after, strict=True))
            return output[0, 0]

        return step

    return begin


def _bound(kind: str, layer: nn.RNNBase) -> Begin:
    """Bind the arrays: input and output in one place, states to and fro between two."""
    session, sizes = _session(kind, layer)

    def begin() -> Callable[[Floats], Floats]:
        x_in = np.zeros((1, 1, layer.input_size), np.float32)
        y_out = np.zeros((1, 1, layer.hidden_size), np.float32)
        places = [{name: np.zeros(shape, np.float32) for name, shape in sizes.items()} for _ in range(2)]
        bindings = []
        for now, following in ((0, 1), (1, 0)):
            binding = session.io_binding()
            arrays = [("X", x_in), *places[now].items()]
            results = [(session.get_outputs()[0].name, y_out)]
            results += [(f"{name}_out", array) for name, array in places[following].items()]
            for name, array in arrays:
                binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            for name, array in results:
                binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            bindings.append(binding)
        turn = [0]

        def step(x: Floats) -> Floats:
            x_in[0, 0] = x
            session.run_with_iobinding(bindings[turn[0]])
            turn[0] = 1 - turn[0]
            return y_out[0, 0]

        step.arrays = places  # type: ignore[attr-defined]  # which are bound by address
        return step

    return begin
