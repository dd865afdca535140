"""ONNX Runtime's recurrent operators, for inference."""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.speed.problem import Problem

# ONNX's order of gates, in torch's: LSTM i o f c, GRU z r h.
_ORDER = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}


def runner(problem: Problem) -> Callable[[], Any]:
    """Return what runs the layer in a session with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        _model(problem).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"X": problem.tensors[0].numpy()}
    return lambda: session.run(None, feed)


def read(results: list[Any]) -> list[Tensor]:
    """Bring ONNX's output (T, directions, B, H) to torch's form."""
    return [torch.from_numpy(results[0]).squeeze(1)]


def _model(problem: Problem) -> onnx.ModelProto:
    weight_ih, weight_hh, bias_ih, bias_hh = (_reordered(p, problem.cell) for p in _parameters(problem.module))
    weights = {"W": weight_ih[None], "R": weight_hh[None], "B": torch.cat([bias_ih, bias_hh])[None]}
    attributes: dict[str, Any] = {"linear_before_reset": 1} if problem.cell == "gru" else {}
    node = helper.make_node(
        problem.cell.upper(), ["X", *weights], ["Y"], name="layer", hidden_size=problem.hidden, **attributes
    )
    steps, batch, hidden = problem.steps, problem.batch, problem.hidden
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, hidden])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [steps, 1, batch, hidden])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _parameters(module: nn.RNNBase) -> list[Tensor]:
    return [p.detach() for p in module.parameters()]


def _reordered(tensor: Tensor, cell: str) -> Tensor:
    gates = tensor.chunk(len(_ORDER[cell]))
    return torch.cat([gates[index] for index in _ORDER[cell]])
