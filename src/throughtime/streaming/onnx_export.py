"""A model as an ONNX file: any number of its steps, with the state as inputs and outputs; checked before it is in place."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from throughtime import schema
from throughtime.errors import InputError
from throughtime.onnx import layout
from throughtime.onnx.packages import runtime
from throughtime.request import Direction, Request
from throughtime.spec import Parameters
from throughtime.streaming.placing import write_whole
from throughtime.streaming.reading import LinearStage, RecurrentStage, Snapshot, snapshot

_OPSET, _IR = 17, 8  # of 2021: what every runtime in use reads
_MOST_BYTES = 2_000_000_000  # of a protobuf, in which a model without other files has to fit


class ExportedOnnx(NamedTuple):
    """What was written.

    Attributes:
        path: The file.
        inputs: Names of its inputs: "ids" or "x", then the states'.
        outputs: Names of its outputs, then the states'.
        parameters: Bytes of its weights.
        largest_error: The largest difference, of output and states, between ONNX Runtime and the equations in float64.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: int
    largest_error: float


def export_onnx(model: Any, path: str | Path, *, ids: bool | None = None) -> ExportedOnnx:
    """Write a model as ONNX: a graph of T steps of B rows, with standard LSTM, GRU and RNN nodes.

    Its inputs are `ids` (T, B), int64, or `x` (T, B, I), and for each recurrent layer n the state before, `h_n` (1, B, H) and, of
    an LSTM, `c_n`. Its outputs are `output` (T, B, O), or of a model that reads ids `logits` (T, B, V) and `probabilities`, and the
    state after, `next_h_n` and `next_c_n`. T and B are any. To step it, give one step at a time and as the state what came out as
    the next one; a fresh state is zeros.

    ONNX Runtime computes some steps before the file is put in place, and so do the equations in float64.

    Args:
        model: What `throughtime.stream` takes: a recurrent layer of one direction, an `nn.Sequential` of an embedding, recurrent
            and linear layers, a `LanguageModel` or a loaded run. It is written as it computes in `eval()`, in float32.
        path: The file to write.
        ids: Whether it reads token ids; `None` leaves that to the model.

    Raises:
        InputError: A part of the model has no node of ONNX's (layer normalisation, a projection, zoneout), or can't be stepped;
            ONNX Runtime computes something else; or the extra `throughtime[onnx]` isn't there.
        OSError: The file can't be written.

    Example:
        >>> import torch, throughtime
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), throughtime.LSTM(4, 8), torch.nn.Linear(8, 9))
        >>> done = throughtime.export_onnx(model, "model.onnx")
        >>> done.inputs, done.outputs
        (('ids', 'h_0', 'c_0'), ('logits', 'probabilities', 'next_h_0', 'next_c_0'))
        >>> done.largest_error < 1e-5
        True
    """
    path, seen = Path(path), snapshot(model, ids)
    if not path.name:
        raise InputError(f"path={str(path)!r} names no file; expected one such as model.onnx")
    onnx, _ = runtime("a model as ONNX")
    writer = _Writer(onnx, seen)
    if writer.bytes > _MOST_BYTES:
        raise InputError(
            f"the model's weights take {writer.bytes:,} bytes; one ONNX file holds {_MOST_BYTES:,} at most"
        )
    made = writer.model()
    onnx.checker.check_model(made, full_check=True)
    content = made.SerializeToString()
    largest_error = _check(content, seen)
    write_whole(path, content)
    return ExportedOnnx(path, tuple(writer.inputs), tuple(writer.outputs), writer.bytes, largest_error)


class _Writer:
    """Gathers weights and nodes, in the order in which they are computed."""

    def __init__(self, onnx: Any, seen: Snapshot) -> None:
        self.onnx, self.seen = onnx, seen
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.bytes = 0
        states: dict[str, Any] = {}
        current = self._embedded()
        for place, stage in enumerate(seen.stages):
            if isinstance(stage, LinearStage):
                current = self._linear(stage, current, place)
            else:
                current = self._recurrent(stage, current, states)
        self._give(current, states)

    def constant(self, name: str, tensor: Tensor) -> str:
        """Add a weight."""
        self.weights.append(self.onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name))
        self.bytes += tensor.nbytes
        return name

    def node(self, op: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its first output."""
        self.nodes.append(self.onnx.helper.make_node(op, inputs, list(outputs), name=outputs[0], **attributes))
        return outputs[0]

    def value(self, name: str, *shape: int | str, of: str = "FLOAT") -> Any:
        """Say what an input or an output is."""
        return self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.DataType.Value(of), shape)

    def _embedded(self) -> str:
        """Return the name of what the first layer reads."""
        seen = self.seen
        if not seen.reads_ids:
            self.inputs["x"] = self.value("x", "T", "B", seen.stages[0].input_size)
            return "x"
        self.inputs["ids"] = self.value("ids", "T", "B", of="INT64")
        if seen.embedding is not None:
            return self.node("Gather", [self.constant("embedding", seen.embedding), "ids"], "embedded")
        size = seen.vocabulary_size
        depth = self.constant("vocabulary_size", torch.tensor(size))
        chosen = self.node("OneHot", ["ids", depth, self.constant("off_on", torch.tensor([0.0, 1.0]))], "chosen")
        # OneHot makes nothing of an id that there isn't; to choose one of as many zeros is refused there.
        zero = self.node("Gather", [self.constant("nothing", torch.zeros(size, 1)), "ids"], "zero")
        return self.node("Add", [chosen, zero], "one_hot")

    def _linear(self, stage: LinearStage, x: str, place: int) -> str:
        y = self.node("MatMul", [x, self.constant(f"weight_{place}", stage.weight.T)], f"product_{place}")
        return (
            y if stage.bias is None else self.node("Add", [y, self.constant(f"bias_{place}", stage.bias)], f"y_{place}")
        )

    def _recurrent(self, stage: RecurrentStage, x: str, states: dict[str, Any]) -> str:
        p, node, hidden = stage.parameters, layout.node_of(stage.spec), stage.hidden_size
        layout.check(stage.spec, p.weight_hr is not None)
        number = sum(name.startswith("next_h") for name in states)
        own = [f"{part}_{number}" for part in stage.spec.states]
        for name in own:
            self.inputs[name] = self.value(name, 1, "B", hidden)
            states[f"next_{name}"] = self.value(f"next_{name}", 1, "B", hidden)
        arrays = layout.arrays([p], node)
        given = [
            x,
            *("" if a is None else self.constant(f"{name}_{number}", a) for name, a in arrays._asdict().items()),
        ]
        given = [*given[:4], "", *own, *given[4:]]  # no sequence_lens; P comes last
        while not given[-1]:
            given.pop()
        attributes = layout.attributes(node, hidden, ["forward"])
        y = self.node(node.op, given, f"all_{number}", *(f"next_{name}" for name in own), **attributes)
        if "way" not in {weight.name for weight in self.weights}:
            self.constant("way", torch.tensor([1]))
        return self.node("Squeeze", [y, "way"], f"h_all_{number}")

    def _give(self, current: str, states: dict[str, Any]) -> None:
        width, is_read = self.seen.stages[-1].output_size, self.seen.reads_ids
        name = "logits" if is_read else "output"
        self.node("Identity", [current], name)
        self.outputs[name] = self.value(name, "T", "B", width)
        if is_read:
            self.node("Softmax", [name], "probabilities", axis=-1)
            self.outputs["probabilities"] = self.value("probabilities", "T", "B", width)
        self.outputs |= states

    def model(self) -> Any:
        """Put the graph together."""
        helper = self.onnx.helper
        ends = list(self.inputs.values()), list(self.outputs.values())
        graph = helper.make_graph(self.nodes, "throughtime", *ends, self.weights)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, producer_name="throughtime", opset_imports=[opset], ir_version=_IR)


def _check(content: bytes, seen: Snapshot) -> float:
    """Let ONNX Runtime compute some steps, and one more; return the largest difference from the equations in float64."""
    _, onnxruntime = runtime("a model as ONNX")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    chance, rows, largest, scale = torch.Generator().manual_seed(0), 3, 0.0, 1.0
    layers = [stage for stage in seen.stages if isinstance(stage, RecurrentStage)]
    states = [torch.zeros(rows, stage.hidden_size) for stage in layers for _ in stage.spec.states]
    exact = [s.double() for s in states]
    for steps in (20, 1):
        if seen.reads_ids:
            x = torch.randint(seen.vocabulary_size, (steps, rows), generator=chance)
        else:
            x = torch.randn(steps, rows, seen.stages[0].input_size, generator=chance)
        given = zip(session.get_inputs(), [x, *(s[None] for s in states)], strict=True)
        names = [one.name for one in session.get_outputs() if one.name != "probabilities"]
        found = session.run(names, {one.name: tensor.numpy() for one, tensor in given})
        output, *states = [torch.from_numpy(found[0]), *(torch.from_numpy(s[0]) for s in found[1:])]
        expected, exact = _computed(seen, x, exact)
        for actual, right in zip([output, *states], [expected, *exact], strict=True):
            error = float((actual - right).abs().max())
            largest = max(largest, error) if error == error else error  # a NaN stays
            scale = max(scale, float(right.abs().max()))
    if not largest <= 1e-4 * scale:
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} differs from the model by {largest:.2g}, in numbers up to {scale:.2g}; "
            f"expected finite weights, and less than {1e-4 * scale:.2g}. Nothing was written"
        )
    return largest


def _computed(seen: Snapshot, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Compute a model by the equations, in float64; states stand in a row."""
    if seen.reads_ids:
        x = one_hot(x, seen.vocabulary_size) if seen.embedding is None else seen.embedding[x]
    x, after, before = x.double(), [], iter(states)
    for stage in seen.stages:
        if isinstance(stage, LinearStage):
            x = linear(x, stage.weight.double(), None if stage.bias is None else stage.bias.double())
            continue
        parameters = Parameters(**{name: p.double() for name, p in stage.parameters.there().items()})
        initial = tuple(next(before) for _ in stage.spec.states)
        x, final, _ = schema.BACKENDS["reference"].forward(
            Request(stage.spec, x, (Direction(initial, parameters),)), False
        )
        after += final
    return x, after
