"""Models written as ONNX by torch's exporters, and what ONNX Runtime makes of them."""

import io
import warnings
from collections.abc import Sequence

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

NAMES = ("x", "lengths", "h_0", "c_0")
EXPORTERS = {"traced": False, "dynamo": True}


class Layer(nn.Module):
    """A layer that is given lengths and a state; its results stand in a row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor | None = None, *hx: Tensor) -> tuple[Tensor, ...]:
        output, final = self.layer(x, (hx if len(hx) > 1 else hx[0]) if hx else None, lengths=lengths)
        return output, *(final if isinstance(final, tuple) else (final,))


def arguments(layer, steps: int, rows: int, lengths: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Input, lengths and a state for a layer that isn't a projected one."""
    x = torch.randn(rows, steps, layer.input_size) if layer.batch_first else torch.randn(steps, rows, layer.input_size)
    count = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.randn(count, rows, layer.hidden_size) for _ in layer._spec.states]
    return x, torch.tensor([steps, 0, *[1] * rows][:rows] if lengths is None else lengths), *states


def exported(
    model: nn.Module,
    given: tuple[Tensor, ...],
    dynamo: bool,
    batch_first: bool = False,
    axes: list[dict[int, str]] | None = None,
) -> onnx.ModelProto:
    """Return a model as ONNX, of any number of steps and rows, checked by ONNX's own checker; `axes` name those of each input."""
    steps, rows = (1, 0) if batch_first else (0, 1)
    axes = axes or [{steps: "T", rows: "B"}, {0: "B"}, *[{1: "B"}] * (len(given) - 2)][: len(given)]
    names = list(NAMES[: len(given)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            dims = {name: torch.export.Dim(name, min=1) for name in "TB"}
            shapes = [{place: dims[name] for place, name in each.items()} for each in axes]
            shapes = (*shapes[:2], tuple(shapes[2:])) if len(given) > 2 else tuple(shapes)
            program = torch.onnx.export(
                model, given, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False
            )
            made = program.model_proto
        else:
            file = io.BytesIO()
            named = dict(zip(names, axes, strict=True))
            torch.onnx.export(model, given, file, dynamo=False, input_names=names, dynamic_axes=named)
            made = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(made, full_check=True)
    return made


def computed(model: onnx.ModelProto, given: Sequence[Tensor]) -> list[Tensor]:
    """Return what ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    named = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, named)]


def recurrent(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the recurrent nodes of a graph."""
    return [node for node in model.graph.node if node.op_type in ("RNN", "LSTM", "GRU")]


def attributes(node: onnx.NodeProto) -> dict:
    """Return a node's attributes, texts as such."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
