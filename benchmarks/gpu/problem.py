"""One layer's task on a device: weights, input and the output's gradient, the same numbers for everybody."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.gpu.contest import Numerics, Passes
from benchmarks.speed.layer_norm import LayerNormLSTM
from benchmarks.speed.problem import OURS, THEIRS

DOUBLE = Numerics("float64", torch.float64)


@dataclass(frozen=True)
class Problem:
    """A layer and what it is given.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        steps: T.
        batch: B.
        hidden: H, and I.
        device: Where it is computed.
        lengths: Steps of each row (B,), or all T.
        reset: Where episodes begin (T, B), on the device.
        bidirectional: Both ways.
        layer_norm: With layer normalisation.
        is_rounded: Weights, input and gradient are bfloat16's numbers, so that one exact answer serves every 16-bit dtype.
    """

    cell: str
    steps: int
    batch: int
    hidden: int
    device: torch.device
    lengths: Tensor | None = None
    reset: Tensor | None = None
    bidirectional: bool = False
    layer_norm: bool = False
    is_rounded: bool = False

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state_dict that everybody loads, by torch's names."""
        torch.manual_seed(1)
        if self.layer_norm:
            module: nn.Module = LayerNormLSTM(self.hidden)
            for name in ("gain_ih_l0", "gain_hh_l0", "gain_c_l0"):
                nn.init.uniform_(module.get_parameter(name), 0.1, 0.5)  # gains near 1 amplify rounding at each step
        else:
            module = THEIRS[self.cell](self.hidden, self.hidden, bidirectional=self.bidirectional)
        return {name: self._rounded(weight) for name, weight in module.state_dict().items()}

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The input (T, B, I), and the output's gradient."""
        torch.manual_seed(2)
        width = self.hidden * (2 if self.bidirectional else 1)
        x = torch.randn(self.steps, self.batch, self.hidden, device=self.device)
        grad = torch.randn(self.steps, self.batch, width, device=self.device)
        return self._rounded(x), self._rounded(grad)

    def names(self) -> list[str]:
        """Say what the results of training are called."""
        return ["output", "∂input", *(f"∂{name}" for name in self.weights)]

    def by_us(self, numerics: Numerics, backend: str) -> Passes:
        """Our layer, as a user calls it; its weights go to torch.nn and come back."""
        options: dict[str, Any] = {"layer_norm": True} if self.layer_norm else {}
        layer = OURS[self.cell](
            self.hidden, self.hidden, bidirectional=self.bidirectional, backend=backend, device=self.device, **options
        )
        layer.load_state_dict(self.weights)
        if not self.layer_norm:
            theirs = THEIRS[self.cell](self.hidden, self.hidden, bidirectional=self.bidirectional, device=self.device)
            theirs.load_state_dict(layer.state_dict())
            layer.load_state_dict(theirs.state_dict())
        layer = layer.to(numerics.dtype)
        return self.passes(
            lambda x: layer(x, lengths=self.lengths, reset=self.reset)[0], self.parameters(layer), numerics
        )

    def by_torch(self, numerics: Numerics) -> Passes:
        """torch.nn's layer: padded, or where there are lengths packed and unpacked."""
        layer: Any = self.module(THEIRS[self.cell], bidirectional=self.bidirectional).to(numerics.dtype)

        def forward(x: Tensor) -> Tensor:
            if self.lengths is None:
                return layer(x)[0]
            packed, _ = layer(pack_padded_sequence(x, self.lengths, enforce_sorted=False))
            return pad_packed_sequence(packed, total_length=self.steps)[0]

        return self.passes(forward, self.parameters(layer), numerics)

    def module(self, kind: Callable[..., nn.Module], **options: Any) -> Any:
        """Make a module of (I, H) that has the weights, on the device."""
        module = kind(self.hidden, self.hidden, **options)
        module.load_state_dict(self.weights)
        return module.to(self.device)

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """Return a module's parameters in the order of `weights`."""
        return [module.get_parameter(name) for name in self.weights]

    def passes(
        self,
        forward: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        numerics: Numerics,
        batch_first: bool = False,
    ) -> Passes:
        """Return both passes of what maps x to the output; with `batch_first` it reads and writes (B, T, ·)."""
        x, grad = (tensor.to(numerics.dtype) for tensor in self.tensors)
        if batch_first:
            x, grad = x.transpose(0, 1).contiguous(), grad.transpose(0, 1).contiguous()
        leaf = x.clone().requires_grad_()

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return [forward(x)]

        def train() -> list[Tensor]:
            output = forward(leaf)
            return [output.detach(), *torch.autograd.grad(output, [leaf, *parameters], grad)]

        def read(results: list[Tensor]) -> list[Tensor]:
            return [t.transpose(0, 1) if batch_first and t.dim() == 3 else t for t in results]

        return Passes(infer, train, read)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.bfloat16().float() if self.is_rounded else tensor
