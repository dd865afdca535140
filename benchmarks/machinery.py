"""torch's machinery × layers and cells: what works, what is refused in a line that says what to do, and what there is none of.

Prints the tables of docs/torch.md. Every "works" is a comparison with a plain call; anything else that happens is "wrong".

    python -m benchmarks.machinery
"""

import copy
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import throughtime

LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": throughtime.RNN,
    "LSTM": throughtime.LSTM,
    "LSTM, projected": partial(throughtime.LSTM, proj_size=3),
    "GRU": throughtime.GRU,
    "GRU, reset before": partial(throughtime.GRU, reset_after=False),
    "MGU": throughtime.MGU,
    "layer norm": partial(throughtime.LSTM, layer_norm=True),
    "peepholes": partial(throughtime.LSTM, peepholes=True),
    "zoneout": partial(throughtime.GRU, zoneout=0.1),
}
WORKS, REFUSED, NONE = "works", "refused", "–"
_ADVICE = ("to_torch", "throughtime.stream", "torch.nn doesn't have", "leave=")
_STEPS, _ROWS = 6, 3


class Step(nn.Module):
    """A cell, called as a layer is: each of T · B rows is a row of its own, and takes one step."""

    def __init__(self, kind: Callable[..., Any], input_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.cell, self.output_size = kind(input_size, hidden_size, **options), hidden_size

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Return h, (T, B, H)."""
        state = self.cell(x.flatten(0, 1))
        h = state[0] if isinstance(self.cell, nn.LSTMCell | throughtime.LSTMCell) else state
        return (h.view(x.shape[0], x.shape[1], self.output_size),)


CELLS: dict[str, Callable[..., Any]] = {
    "RNNCell": partial(Step, throughtime.RNNCell),
    "LSTMCell": partial(Step, throughtime.LSTMCell),
    "GRUCell": partial(Step, throughtime.GRUCell),
    "GRUCell, reset before": partial(Step, partial(throughtime.GRUCell, reset_after=False)),
    "MGUCell": partial(Step, throughtime.MGUCell),
    "layer norm": partial(Step, partial(throughtime.LSTMCell, layer_norm=True)),
    "peepholes": partial(Step, partial(throughtime.LSTMCell, peepholes=True)),
    "zoneout": partial(Step, partial(throughtime.GRUCell, zoneout=0.1)),
}


class Model(nn.Module):
    """A layer between two of torch's."""

    def __init__(self, make: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(5, 5), make(5, 4, **options)
        self.after = nn.Linear(self.layer.output_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is read off each step, (T, B, 2)."""
        return self.after(self.layer(self.before(x))[0])

    @property
    def recurrent(self) -> Any:
        """The layer, or the cell that is called as one."""
        return self.layer.cell if isinstance(self.layer, Step) else self.layer


Make = Callable[..., Any]


def _same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _model(make: Make) -> tuple[Model, Tensor]:
    torch.manual_seed(1)
    return Model(make).eval(), torch.randn(_STEPS, _ROWS, 5)


def _converted(make: Make) -> None:
    model, x = _model(make)
    expected = model(x)
    made = throughtime.to_torch(model)
    _same(made(x), expected)
    _same(throughtime.convert(made)(x), expected)


def _state_dicts(make: Make) -> str | None:
    layer, x = make(5, 4), torch.randn(_STEPS, _ROWS, 5)
    if layer.mode not in ("RNN_TANH", "LSTM", "GRU"):
        return NONE
    theirs = {"RNN_TANH": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}[layer.mode]
    peer = theirs(5, 4, **({"proj_size": layer.proj_size} if layer.proj_size else {}))
    layer.load_state_dict(peer.state_dict())
    _same(layer(x)[0], peer(x)[0])
    return None


def _state_dicts_of_cells(make: Make) -> str | None:
    cell, x = make(5, 4).cell, torch.randn(_ROWS, 5)
    if cell.mode not in ("RNN_TANH", "LSTM", "GRU"):
        return NONE
    peer = {"RNN_TANH": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[cell.mode](5, 4)
    cell.load_state_dict(peer.state_dict())
    peer.load_state_dict(cell.state_dict())
    for found, expected in zip(cell(x), peer(x), strict=True):
        _same(found, expected)
    return None


def _pickled(make: Make) -> None:
    model, x = _model(make)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    _same(torch.load(file, weights_only=False)(x), model(x))
    _same(copy.deepcopy(model)(x), model(x))


def _compiled(make: Make) -> None:
    model, x = _model(make)
    torch.compiler.reset()
    _same(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def _exported(make: Make) -> None:
    model, x = _model(make)
    steps, rows = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: steps, 1: rows},))
    other = torch.randn(9, 2, 5)
    _same(program.module()(other), model(other))


def _traced(make: Make) -> None:
    model, x = _model(make)
    other = torch.randn(9, 2, 5)
    traced: Any = torch.jit.trace(model, x)
    _same(traced(other), model(other))


def _scripted(make: Make) -> None:
    model, x = _model(make)
    _same(torch.jit.script(model)(x), model(x))


def _written_as_onnx(make: Make, *, dynamo: bool) -> None:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    model, x = _model(make)
    other = torch.randn(9, 2, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        if dynamo:
            dims = {0: torch.export.Dim("T", min=1), 1: torch.export.Dim("B", min=1)}
            torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(dims,), verbose=False)
        else:
            axes = {"x": {0: "T", 1: "B"}}
            torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    _same(torch.from_numpy(found), model(other))


def _symbolic(make: Make) -> None:
    model, x = _model(make)
    traced: Any = torch.fx.symbolic_trace(model)
    _same(traced(x), model(x))


def _mapped(make: Make) -> None:
    model, _ = _model(make)
    x = torch.randn(2, _STEPS, _ROWS, 5)
    _same(torch.func.vmap(model)(x), torch.stack([model(one) for one in x]))


def _by_sample(make: Make) -> None:
    model, x = _model(make)
    model, x = model.double(), x.double()
    parameters: dict[str, Any] = dict(model.named_parameters())

    def loss(parameters: dict[str, Any], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[:, None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for row in range(_ROWS):
        own = torch.autograd.grad(loss(parameters, x[:, row]), list(parameters.values()))
        for gradient, expected in zip(found.values(), own, strict=True):
            _same(gradient[row], expected)


def _forward_mode(make: Make) -> None:
    model, x = _model(make)
    model.double()
    x, tangent = x.double(), torch.randn(x.shape, dtype=torch.float64)
    found = torch.func.jvp(model, (x,), (tangent,))[1]
    step = 1e-6
    _same(found, (model(x + step * tangent) - model(x - step * tangent)) / (2 * step))


def _twice(make: Make) -> None:
    model, x = _model(make)
    model.double()
    assert torch.autograd.gradgradcheck(model, (x[:2, :1].double().requires_grad_(),))


def _autocast(make: Make) -> None:
    model, x = _model(make)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    _same(found.float(), model(x), 0.05)


def _checkpointed(make: Make) -> None:
    model, x = _model(make)
    found = checkpoint(model, x, use_reentrant=False)
    assert isinstance(found, Tensor)
    gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, model(x))]
    for one, other in zip(*gradients, strict=True):
        _same(one, other)


def _parametrized(make: Make) -> None:
    model, x = _model(make)
    expected = model(x)
    name = next(name for name, _ in model.recurrent.named_parameters() if name.startswith("weight_hh"))
    parametrizations.weight_norm(model.recurrent, name)
    _same(model(x), expected)
    model(x).sum().backward()


def _counted(make: Make) -> None:
    model, x = _model(make)
    with FlopCounterMode(display=False) as counter:
        model(x)
    named = model.recurrent.named_parameters()
    products = sum(weight.numel() for name, weight in named if name[:9] in ("weight_ih", "weight_hh", "weight_hr"))
    assert sum(counter.get_flop_counts()["Model.layer"].values()) == 2 * _STEPS * _ROWS * products


def _quantised(make: Make) -> None:
    model, x = _model(make)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, type(model.recurrent)})
    _same(made(x), model(x), 0.1)
    left = [str(w.message) for w in said if "torch.ao leaves" in str(w.message)]
    if type(made.recurrent) is type(model.recurrent):
        raise NotImplementedError(left[0])


def _quantised_by_fx(make: Make) -> None:
    model, x = _model(make)
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    made = quantize_fx.convert_fx(prepared)
    assert type(made.before) is not nn.Linear
    _same(made(x), model(x), 0.1)


def _streamed(make: Make) -> None:
    layer, x = make(5, 4), torch.randn(_STEPS, 5)
    stream = throughtime.stream(layer.eval(), precision="int8")
    _same(torch.as_tensor(stream.feed(x)), layer(x)[0], 0.1)


def _marked(make: Make) -> None:
    layer, x = make(5, 4).eval(), torch.randn(_STEPS, _ROWS, 5)
    output, state = layer(x, mask=torch.rand(_STEPS, _ROWS) < 0.7, reset=torch.rand(_STEPS, _ROWS) < 0.3)
    again, _ = layer(x, state, reset=torch.ones(_STEPS, _ROWS, dtype=torch.bool), lengths=[_STEPS] * _ROWS)
    for t in range(_STEPS):
        _same(again[t], layer(x[t : t + 1])[0][0])
    assert output.isfinite().all()


MACHINERY: dict[str, Callable[[Make], str | None]] = {
    "state_dict to and from torch.nn": _state_dicts,
    "`throughtime.convert`, `to_torch`": _converted,
    "pickle, deepcopy": _pickled,
    "lengths, mask, reset, reset_to": _marked,
    "`torch.compile(fullgraph=True)`": _compiled,
    "`torch.export`, T and B dynamic": _exported,
    "`torch.jit.trace`": _traced,
    "`torch.onnx.export(dynamo=True)`, T and B dynamic": partial(_written_as_onnx, dynamo=True),
    "`torch.onnx.export(dynamo=False)`, T and B dynamic": partial(_written_as_onnx, dynamo=False),
    "`torch.jit.script`": _scripted,
    "`torch.fx.symbolic_trace`": _symbolic,
    "`torch.func.vmap`": _mapped,
    "`vmap(grad(…))`, gradients by sample": _by_sample,
    "`torch.func.jvp`": _forward_mode,
    "second derivatives": _twice,
    "`torch.autocast`": _autocast,
    "`torch.utils.checkpoint`": _checkpointed,
    "parametrizations": _parametrized,
    "`FlopCounterMode`": _counted,
    "`torch.ao` `quantize_dynamic`": _quantised,
    "`torch.ao` `prepare_fx`, `convert_fx`": _quantised_by_fx,
    '`throughtime.stream(…, precision="int8")`': _streamed,
}

OF_CELLS = {**MACHINERY, "state_dict to and from torch.nn": _state_dicts_of_cells}
for _own in ("lengths, mask, reset, reset_to", '`throughtime.stream(…, precision="int8")`'):
    del OF_CELLS[_own]  # a layer's


def outcome(check: Callable[[Make], str | None], make: Make) -> str:
    """Return what happens: that it works, is refused in words that help, is not there, or is wrong and how."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(make) or WORKS
    except Exception as error:
        return REFUSED if any(words in str(error) for words in _ADVICE) else f"wrong: {type(error).__name__}: {error}"


def table(rows: dict[str, Callable[[Make], str | None]], columns: dict[str, Make]) -> str:
    """Return a table, in Markdown."""
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(outcome(check, make) for make in columns.values())] for name, check in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table(MACHINERY, LAYERS)}\n\n{table(OF_CELLS, CELLS)}\n")
