"""The cells as one writes them in JAX: lax.scan over the steps, jitted, with the input's product before it."""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor

from benchmarks.speed.problem import Problem

Array = Any  # jax.Array, where jax is installed: it is an optional peer
_Step = Callable[[Any, Array, Array, Array], tuple[Any, Array]]


def runner(problem: Problem) -> Callable[[], Any]:
    """Return what runs the layer; jax uses all cores, whatever torch's number of threads."""
    x, grad = (jnp.asarray(tensor.numpy()) for tensor in problem.tensors)
    parameters = [jnp.asarray(p.detach().numpy()) for p in problem.module.parameters()]
    zero = jnp.zeros((problem.batch, problem.hidden))
    initial = (zero, zero) if problem.cell == "lstm" else zero
    step = _STEPS[problem.cell]

    def forward(x: Array, parameters: list[Array]) -> Array:
        weight_ih, weight_hh, bias_ih, bias_hh = parameters
        through = x @ weight_ih.T + bias_ih
        return lax.scan(lambda state, a: step(state, a, weight_hh, bias_hh), initial, through)[1]

    def train(x: Array, parameters: list[Array]) -> list[Array]:
        output, backward = jax.vjp(forward, x, parameters)
        grad_x, grad_parameters = backward(grad)
        return [output, grad_x, *grad_parameters]

    compiled = jax.jit(train if problem.training else lambda x, parameters: [forward(x, parameters)])
    return lambda: jax.block_until_ready(compiled(x, parameters))


def read(results: list[Array]) -> list[Tensor]:
    """Copy jax's arrays to torch."""
    return [torch.from_numpy(np.array(array)) for array in results]


def _lstm(state: tuple[Array, Array], a: Array, weight_hh: Array, bias_hh: Array) -> tuple[tuple[Array, Array], Array]:
    h, c = state
    i, f, g, o = jnp.split(a + h @ weight_hh.T + bias_hh, 4, axis=1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _gru(h: Array, a: Array, weight_hh: Array, bias_hh: Array) -> tuple[Array, Array]:
    r, z, n = jnp.split(a, 3, axis=1)
    through_r, through_z, through_n = jnp.split(h @ weight_hh.T + bias_hh, 3, axis=1)
    z = jax.nn.sigmoid(z + through_z)
    n = jnp.tanh(n + jax.nn.sigmoid(r + through_r) * through_n)
    h = (1 - z) * n + z * h
    return h, h


def _rnn(h: Array, a: Array, weight_hh: Array, bias_hh: Array) -> tuple[Array, Array]:
    h = jnp.tanh(a + h @ weight_hh.T + bias_hh)
    return h, h


_STEPS: dict[str, _Step] = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
