"""Layers drawn at random, as ONNX files, computed by ONNX Runtime: `python -m benchmarks.onnx_parity` prints the worst errors.

Each is drawn from its own seed, exported by torch's exporter that traces (`--dynamo N` sends the first N by the other one, which
takes seconds for each), run at another T and B than it was exported with, with lengths and a state or without, compared with the
layer in float64, and read back by `throughtime.from_onnx`. Errors are relative to the largest number, at least 1.
"""

import argparse
import logging
import random
import sys
import tempfile
import warnings
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import throughtime

ALLOWED = 1e-5


class Drawn(NamedTuple):
    """A layer, and how it is called."""

    layer: nn.Module
    has_lengths: bool
    has_state: bool


class _Called(nn.Module):
    """Gives a layer its arguments by place; its results stand in a row."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.layer, self.drawn = drawn.layer, drawn

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        lengths, *state = rest if self.drawn.has_lengths else (None, *rest)
        output, final = self.layer(
            x, (tuple(state) if len(state) > 1 else state[0]) if state else None, lengths=lengths
        )
        return output, *(final if isinstance(final, tuple) else (final,))


def draw(seed: int) -> Drawn:
    """Return the configuration of a seed."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    sizes = chance.randint(1, 9), chance.randint(1, 17), chance.randint(1, 3)
    options: dict[str, Any] = {name: chance.random() < 0.5 for name in ("bias", "batch_first", "bidirectional")}
    kind = chance.choice(["LSTM", "GRU", "RNN", "MGU"])
    if kind == "LSTM":
        options |= {name: chance.random() < 0.5 for name in ("peepholes", "coupled")}
    elif kind == "GRU":
        options["reset_after"] = chance.random() < 0.5
    elif kind == "RNN":
        options["nonlinearity"] = chance.choice(["tanh", "relu"])
    layer = getattr(throughtime, kind)(*sizes, **options).eval()
    return Drawn(layer, chance.random() < 0.6, chance.random() < 0.6)


def arguments(drawn: Drawn, steps: int, rows: int) -> tuple[Tensor, ...]:
    """Return what a layer is called with, lengths of zero and of T among them."""
    layer: Any = drawn.layer
    x = torch.randn(rows, steps, layer.input_size) if layer.batch_first else torch.randn(steps, rows, layer.input_size)
    lengths = torch.randint(steps + 1, (rows,))
    count = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.randn(count, rows, layer.hidden_size) for _ in range(2 if "lstm" in layer.cell else 1)]
    return x, *([lengths] if drawn.has_lengths else []), *(states if drawn.has_state else [])


def export(drawn: Drawn, dynamo: bool) -> onnx.ModelProto:
    """Return a layer as ONNX, of any T and B, which ONNX's own checker has seen."""
    given, by_row = arguments(drawn, 4, 3), bool(getattr(drawn.layer, "batch_first", False))
    names = ["x", *(["lengths"] if drawn.has_lengths else [])]
    axes = [{int(by_row): "T", 1 - int(by_row): "B"}, *[{0: "B"}] * drawn.has_lengths]
    axes += [{1: "B"}] * (len(given) - len(names))
    names += [f"state_{place}" for place in range(len(given) - len(names))]
    own: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            dims = {name: torch.export.Dim(name, min=1) for name in "TB"}
            shapes = [{place: dims[name] for place, name in each.items()} for each in axes]
            own = (shapes[0], tuple(shapes[1:])) if len(shapes) > 1 else tuple(shapes)
            program = torch.onnx.export(_Called(drawn).eval(), given, dynamo=True, dynamic_shapes=own, verbose=False)
            assert program is not None
            made = program.model_proto
        else:
            own = dict(zip(names, axes, strict=True))
            with tempfile.TemporaryDirectory() as folder:
                path = f"{folder}/layer.onnx"
                model = _Called(drawn).eval()
                torch.onnx.export(model, given, path, dynamo=False, input_names=names, dynamic_axes=own)
                made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    return made


def error(seed: int, dynamo: bool = False) -> float:
    """Return the largest error of a configuration, of what ONNX Runtime computes and of what is read back."""
    drawn = draw(seed)
    made = export(drawn, dynamo)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    chance, worst = random.Random(-seed), 0.0
    exact = _Called(Drawn(draw(seed).layer.double(), *drawn[1:])).eval()
    for _ in range(2):
        given = arguments(drawn, chance.randint(1, 30), chance.randint(1, 7))
        named = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), given, strict=True)}
        with torch.no_grad():
            expected = exact(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
        for found, right in zip(session.run(None, named), expected, strict=True):
            scale = max(1.0, float(right.abs().max()))
            worst = max(worst, float((torch.from_numpy(found) - right).abs().max()) / scale)
    return max(worst, _error_read_back(drawn, made))


def _error_read_back(drawn: Drawn, made: onnx.ModelProto) -> float:
    """Return how far layers that are read back are from the layer, each above the other and without lengths."""
    layer: Any = drawn.layer
    x = torch.randn(5, 2, layer.input_size)
    with torch.no_grad():
        expected = layer(x.transpose(0, 1) if layer.batch_first else x)[0]
        for one in throughtime.from_onnx(made).values():
            x = one.layer(x)[0]
        expected = expected.transpose(0, 1) if layer.batch_first else expected
    return float((x - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def main(arguments: list[str] | None = None) -> int:
    """Print the worst errors; return 1 where one is above what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="how many configurations")
    parser.add_argument("--dynamo", type=int, default=0, help="how many of them by the exporter with torch.export")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    found = []
    for seed in range(given.count):
        found.append((error(seed, seed < given.dynamo), seed))
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{seed + 1} of {given.count}")
    found.sort(reverse=True)
    sys.stdout.write(f"torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}\n")
    sys.stdout.write(f"{given.count} configurations, {given.dynamo} of them by torch.export; the worst errors:\n")
    for worst, seed in found[:5]:
        drawn = draw(seed)
        sys.stdout.write(
            f"{worst:.1e}  seed {seed}: {drawn.layer}, lengths {drawn.has_lengths}, state {drawn.has_state}\n"
        )
    return int(not found[0][0] <= ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
