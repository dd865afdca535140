"""A layer-normalised LSTM as one writes it in torch, eager or compiled.

a = LN(W_ih x; γ_ih) + LN(W_hh h; γ_hh) + b, c = f ⊙ c + i ⊙ g, h = o ⊙ tanh(LN(c; γ_c, β_c)): Ba et al. (2016), equations 20 to 22,
each LN of a over all four gates together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from benchmarks.speed.case import Results
from benchmarks.speed.problem import OURS, Problem


class LayerNormLSTM(nn.Module):
    """One layer, its parameters named as throughtime's."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        bound = hidden**-0.5
        self.weight_ih_l0 = _uniform(-bound, bound, 4 * hidden, hidden)
        self.weight_hh_l0 = _uniform(-bound, bound, 4 * hidden, hidden)
        self.bias_ih_l0 = _uniform(-bound, bound, 4 * hidden)
        self.bias_hh_l0 = _uniform(-bound, bound, 4 * hidden)
        self.gain_ih_l0 = _uniform(0.5, 1.5, 4 * hidden)
        self.gain_hh_l0 = _uniform(0.5, 1.5, 4 * hidden)
        self.gain_c_l0 = _uniform(0.5, 1.5, hidden)
        self.shift_c_l0 = _uniform(-0.5, 0.5, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (T, B, H) for x (T, B, H)."""
        return self.loop(x, self.step)

    def loop(self, x: Tensor, step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Do the same with another function in place of `step`."""
        h = c = x.new_zeros(x.shape[1], self.hidden)
        outputs = []
        for through in self.of_input(x).unbind():
            h, c = step(through, h, c)
            outputs.append(h)
        return torch.stack(outputs)

    def of_input(self, x: Tensor) -> Tensor:
        """Return what the input adds to the gates in all steps, (T, B, 4 H)."""
        return layer_norm(linear(x, self.weight_ih_l0), (4 * self.hidden,), self.gain_ih_l0, self.bias_ih_l0)

    def step(self, through: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Advance (h, c), both (B, H), by a step to whose gates the input adds `through` (B, 4 H)."""
        gates, hidden = (4 * self.hidden,), (self.hidden,)
        a = through + layer_norm(linear(h, self.weight_hh_l0), gates, self.gain_hh_l0, self.bias_hh_l0)
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * layer_norm(c, hidden, self.gain_c_l0, self.shift_c_l0).tanh(), c


def by_torch(problem: Problem, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Callable[[], Results]:
    """Return what runs the layer in torch."""
    layer = _layer(problem).to(dtype)
    forward: Any = torch.compile(layer) if compiled else layer
    return problem.differentiated(forward, list(layer.parameters()), dtype)


def by_honest_computations(problem: Problem) -> list[Callable[[], Results]]:
    """Return what runs the equations: with the layer's weights, and twice with each weight's nearest neighbour."""
    return [by_us(problem, "reference", moved=seed) for seed in range(3)]


def by_us(problem: Problem, backend: str = "auto", moved: int = 0) -> Callable[[], Results]:
    """Return what runs throughtime's layer; `moved` is the seed of a last-place change of its weights, 0 for none."""
    theirs = _layer(problem)
    if moved:
        generator = torch.Generator().manual_seed(moved)
        for weight in theirs.parameters():
            towards = torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1
            weight.data = torch.nextafter(weight.data, weight.data + towards)
    layer = OURS["lstm"](problem.hidden, problem.hidden, layer_norm=True, backend=backend)
    layer.load_state_dict(theirs.state_dict())
    parameters = [layer.get_parameter(name) for name, _ in theirs.named_parameters()]
    return problem.differentiated(lambda x: layer(x)[0], parameters)


def _layer(problem: Problem) -> LayerNormLSTM:
    torch.manual_seed(1)
    return LayerNormLSTM(problem.hidden)


def _uniform(low: float, high: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(low, high))
