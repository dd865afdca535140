"""One layer's task, and the ways to do it with throughtime and with torch."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import throughtime
from benchmarks.speed.case import Results
from throughtime.backend import native
from throughtime.request import Request

THEIRS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
OURS: dict[str, Callable[..., nn.Module]] = {"lstm": throughtime.LSTM, "gru": throughtime.GRU, "rnn": throughtime.RNN}
KERNELS = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}


def missing_bfloat16() -> str | None:
    """Say why there is no bf16 to measure, or nothing."""
    one = torch.zeros(1, 1, dtype=torch.bfloat16)
    if native.refusal(Request.read("lstm", one[None], [one, one], [one, one])) is None:
        return None
    return "the native kernels have no bfloat16 yet"


def missing_layer_norm() -> str | None:
    """Say why there is no layer normalisation to measure, or nothing."""
    if "layer_norm" in inspect.signature(throughtime.LSTM).parameters:
        return None
    return "throughtime.LSTM has no layer_norm= yet"


@dataclass(frozen=True)
class Problem:
    """A layer, its input, and the gradient that comes back to its output; the same numbers for everybody.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        steps: T.
        batch: B.
        hidden: H.
        training: Forward and backward; else forward in inference mode.
        lengths: Steps of each row, or all T.
        reset: Where episodes begin (T, B).
        layers: L.
        bidirectional: Both ways.
        inputs: I; 0 for as many as H.
        many_to_one: The loss is on the last step only, so that the gradients of all others fade.
    """

    cell: str
    steps: int
    batch: int
    hidden: int
    training: bool = True
    lengths: Tensor | None = None
    reset: Tensor | None = None
    layers: int = 1
    bidirectional: bool = False
    inputs: int = 0
    many_to_one: bool = False

    @cached_property
    def module(self) -> nn.RNNBase:
        """The layer of torch.nn, whose weights everybody has."""
        torch.manual_seed(1)
        return THEIRS[self.cell](self.inputs or self.hidden, self.hidden, self.layers, bidirectional=self.bidirectional)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The input, and the output's gradient."""
        torch.manual_seed(2)
        width = self.hidden * (2 if self.bidirectional else 1)
        x = torch.randn(self.steps, self.batch, self.inputs or self.hidden)
        grad = torch.randn(self.steps, self.batch, width)
        if self.many_to_one:
            grad[:-1] = 0
        return x, grad

    def by_torch(self, dtype: torch.dtype = torch.float32) -> Callable[[], Results]:
        """The layer of torch.nn: padded, or where there are lengths packed and unpacked."""
        layer = self._copy(dtype)

        def forward(x: Tensor) -> Tensor:
            if self.lengths is None:
                return layer(x)[0]
            packed, _ = layer(pack_padded_sequence(x, self.lengths, enforce_sorted=False))
            return pad_packed_sequence(packed, total_length=self.steps)[0]

        return self.differentiated(forward, list(layer.parameters()), dtype)

    def by_torch_autocast(self) -> Callable[[], Results]:
        """The layer of torch.nn with float32 weights under bf16 autocast."""
        layer = self._copy(torch.float32)

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)[0]

        return self.differentiated(forward, list(layer.parameters()))

    def by_steps(self, dtype: torch.dtype = torch.float32) -> Callable[[], Results]:
        """The LSTM of torch.nn called for one step at a time, its state set to zero where an episode begins."""
        layer = self._copy(dtype)
        going_on = self._going_on(dtype)

        def forward(x: Tensor) -> Tensor:
            h = c = x.new_zeros(1, self.batch, self.hidden)
            outputs = []
            for step, keep in zip(x.split(1), going_on, strict=True):
                output, (h, c) = layer(step, (h * keep, c * keep))
                outputs.append(output)
            return torch.cat(outputs)

        return self.differentiated(forward, list(layer.parameters()), dtype)

    def by_cell(self) -> Callable[[], Results]:
        """torch.nn.LSTMCell in a loop, its state set to zero where an episode begins."""
        cell = nn.LSTMCell(self.hidden, self.hidden)
        cell.load_state_dict({name.removesuffix("_l0"): p for name, p in self.module.state_dict().items()})
        going_on = self._going_on(torch.float32)

        def forward(x: Tensor) -> Tensor:
            h = c = x.new_zeros(self.batch, self.hidden)
            outputs = []
            for step, keep in zip(x.unbind(), going_on, strict=True):
                h, c = cell(step, (h * keep, c * keep))
                outputs.append(h)
            return torch.stack(outputs)

        return self.differentiated(forward, list(cell.parameters()))

    def by_us(self, dtype: torch.dtype = torch.float32) -> Callable[[], Results]:
        """Our layer, as a user calls it; in bf16 under autocast, as the peer."""
        layer = OURS[self.cell](self.inputs or self.hidden, self.hidden, self.layers, bidirectional=self.bidirectional)
        layer.load_state_dict(self.module.state_dict())

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return layer(x, lengths=self.lengths, reset=self.reset)[0]

        return self.differentiated(forward, list(layer.parameters()))

    def by_kernels(self) -> Callable[[], Results]:
        """The kernels' functions alone, without layer and autograd."""
        x, grad = self.tensors
        cell, parameters = KERNELS[self.cell], [p.detach() for p in self._copy(torch.float32).parameters()]
        initial = [torch.zeros(self.batch, self.hidden)] * (2 if cell == "lstm" else 1)

        request = Request.read(cell, x, initial, parameters, lengths=self.lengths, reset=self.reset)

        def run() -> Results:
            output, final, saved = native.forward(request, self.training)
            if not self.training:
                return [output]
            gradient = native.backward(request, grad, [torch.zeros_like(s) for s in final], output, saved)
            assert gradient.input is not None
            return [output, gradient.input, *gradient.parameters]

        return run

    def differentiated(
        self, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], dtype: torch.dtype = torch.float32
    ) -> Callable[[], Results]:
        """Return what runs `forward`, and in training backward: output, and gradients of input and parameters."""
        x, grad = (tensor.to(dtype).detach() for tensor in self.tensors)
        if not self.training:

            def infer() -> Results:
                with torch.inference_mode():
                    return [forward(x)]

            return infer
        x.requires_grad_()
        grad_like = cache(grad.to)  # an output under autocast is bf16

        def train() -> Results:
            output = forward(x)
            return [output.detach(), *torch.autograd.grad(output, [x, *parameters], grad_like(output.dtype))]

        return train

    def _copy(self, dtype: torch.dtype) -> Any:
        layer = THEIRS[self.cell](
            self.inputs or self.hidden, self.hidden, self.layers, bidirectional=self.bidirectional
        )
        layer.load_state_dict(self.module.state_dict())
        return layer.to(dtype)

    def _going_on(self, dtype: torch.dtype) -> list[Tensor]:
        """For each step (B, 1): 0 where an episode begins, else 1."""
        assert self.reset is not None
        return list((~self.reset).to(dtype)[:, :, None])
