"""What a user takes on a GPU without throughtime: loops over cells, CUDA graphs of them, torch.compile, TorchRL, FlashRNN."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from benchmarks.gpu.contest import Numerics, Passes
from benchmarks.gpu.problem import Problem
from benchmarks.speed.layer_norm import LayerNormLSTM


def missing(device: torch.device, package: str | None = None) -> str | None:
    """Say why what needs CUDA, and perhaps a package, can't take part here, or nothing."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if package is not None and find_spec(package) is None:
        return f"{package} isn't installed"
    return None


class CellLoop(nn.Module):
    """torch.nn's cell in a loop over steps; its state is multiplied by 0 where an episode begins."""

    def __init__(self, cell: str, hidden: int, reset: Tensor) -> None:
        super().__init__()
        self.cell = (nn.LSTMCell if cell == "lstm" else nn.GRUCell)(hidden, hidden)
        self.reset = reset

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (T, B, H) for x (T, B, I)."""
        going_on = (~self.reset).to(x.dtype)[:, :, None]
        h = c = x.new_zeros(x.shape[1], self.cell.hidden_size)
        outputs = []
        for step, keep in zip(x.unbind(), going_on.unbind(), strict=True):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(step, (h * keep, c * keep))
            else:
                h = self.cell(step, h * keep)
            outputs.append(h)
        return torch.stack(outputs)


def cell_loop(problem: Problem, numerics: Numerics, graphed: bool = False) -> Passes:
    """The loop over torch.nn's fused cell; `graphed` replays it whole, as a CUDA graph for each pass."""
    assert problem.reset is not None
    loop = CellLoop(problem.cell, problem.hidden, problem.reset)
    loop.cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in problem.weights.items()})
    loop = loop.to(problem.device, numerics.dtype)
    parameters = [loop.cell.get_parameter(name.removesuffix("_l0")) for name in problem.weights]
    return problem.passes(_graphed(problem, loop, numerics) if graphed else loop, parameters, numerics)


def segments(problem: Problem, numerics: Numerics) -> Passes:
    """torch.nn's layer on the segments between resets, each a sequence of a PackedSequence; cut and put together in each call."""
    reset = problem.reset
    assert reset is not None
    layer = problem.module(nn.LSTM if problem.cell == "lstm" else nn.GRU).to(numerics.dtype)

    def forward(x: Tensor) -> Tensor:
        steps, rows, width = x.shape
        begins = reset.T.clone()
        begins[:, 0] = True
        places = begins.flatten().nonzero().squeeze(1)
        lengths = places.diff(append=places.new_tensor([steps * rows]))
        pieces = x.transpose(0, 1).reshape(steps * rows, width).split(lengths.tolist())
        output, _ = pad_packed_sequence(layer(pack_sequence(list(pieces), enforce_sorted=False))[0], batch_first=True)
        is_real = torch.arange(output.shape[1], device=x.device) < lengths[:, None]
        return output[is_real].view(rows, steps, -1).transpose(0, 1)

    return problem.passes(forward, problem.parameters(layer), numerics)


def torchrl(problem: Problem, numerics: Numerics, precision: str) -> Passes:
    """TorchRL's Triton kernels, called without their module's overhead; `precision` is "ieee", "tf32" or "tf32x3"."""
    kernels = import_module("torchrl.modules.tensordict_module._rnn_triton")
    assert problem.reset is not None
    is_init = problem.reset.T.contiguous()
    parameters = [nn.Parameter(weight.to(problem.device, numerics.dtype)) for weight in problem.weights.values()]
    zeros = torch.zeros(problem.batch, problem.steps, problem.hidden, dtype=numerics.dtype, device=problem.device)
    is_lstm = problem.cell == "lstm"

    def forward(x: Tensor) -> Tensor:
        call = kernels.lstm_triton if is_lstm else kernels.gru_triton
        state = (zeros, zeros) if is_lstm else (zeros,)
        return call(x, *state, *parameters, is_init, input_precision=precision)[0]

    return problem.passes(forward, parameters, numerics, batch_first=True)


def flashrnn(problem: Problem, numerics: Numerics, backend: str) -> Passes:
    """FlashRNN, its input's product made by torch; `backend` is "cuda_fused" or "cuda", the alternating one."""
    library: Any = import_module("flashrnn")
    hidden, rows = problem.hidden, problem.batch
    parameters = [nn.Parameter(weight.to(problem.device, numerics.dtype)) for weight in problem.weights.values()]
    config = library.FlashRNNConfig(
        backend=backend,
        function=problem.cell,
        num_heads=1,
        head_dim=hidden,
        batch_size=rows,
        dtype=str(numerics.dtype).removeprefix("torch."),
        input_shape="TBGHD",
        output_shape="STBHD",
    )

    def forward(x: Tensor) -> Tensor:
        weight_ih, weight_hh, bias_ih, bias_hh = parameters
        through = linear(x, weight_ih).view(problem.steps, rows, -1, 1, hidden)
        bias = (bias_ih + bias_hh).view(-1, 1, hidden)
        states, _ = library.flashrnn(through, weight_hh.view(-1, 1, hidden, hidden), bias, config=config)
        return states[0].flatten(2)

    return problem.passes(forward, parameters, numerics)


class SteppedLayerNorm(nn.Module):
    """The layer-normalised LSTM looped over a given step of its own, such as a compiled one."""

    def __init__(self, layer: LayerNormLSTM, step: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (T, B, H) for x (T, B, H)."""
        return self.layer.loop(x, self.step)


def layer_norm(problem: Problem, numerics: Numerics, how: str = "eager") -> Passes:
    """The layer-normalised LSTM in torch.

    Args:
        problem: What is computed.
        numerics: In what.
        how: "eager"; "graphed", the eager loop as a CUDA graph for each pass; "step", its step compiled; "reduce-overhead", the
            step compiled so; "step graphed", the loop over the compiled step as a CUDA graph; "whole", the loop compiled.
    """
    layer = LayerNormLSTM(problem.hidden)
    layer.load_state_dict(problem.weights)
    layer = layer.to(problem.device, numerics.dtype)
    forward = _layer_norm_forward(problem, numerics, layer, how)
    return problem.passes(forward, problem.parameters(layer), numerics)


def _layer_norm_forward(
    problem: Problem, numerics: Numerics, layer: LayerNormLSTM, how: str
) -> Callable[[Tensor], Tensor]:
    if how == "eager":
        return layer
    if how == "graphed":
        return _graphed(problem, layer, numerics)
    _let_recompile()
    if how == "whole":
        return torch.compile(layer)
    if how == "reduce-overhead":
        stepped = SteppedLayerNorm(layer, torch.compile(layer.step, mode=how))

        def forward(x: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return stepped(x)

        return forward
    stepped = SteppedLayerNorm(layer, torch.compile(layer.step))
    return _graphed(problem, stepped, numerics) if how == "step graphed" else stepped


def _let_recompile() -> None:
    """Have torch.compile say where it gives up, and count the layers of other contests in the same code less soon."""
    config: Any = import_module("torch._dynamo.config")
    config.recompile_limit, config.fail_on_recompile_limit_hit = 64, True


def _graphed(problem: Problem, module: nn.Module, numerics: Numerics) -> Callable[[Tensor], Tensor]:
    """Capture a module's passes as CUDA graphs."""
    x = problem.tensors[0].to(numerics.dtype).clone().requires_grad_()
    graphed: Any = torch.cuda.make_graphed_callables(module, (x,))
    return graphed
