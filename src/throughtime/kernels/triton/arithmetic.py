"""What a step computes for a tile of rows and units: the equations of `throughtime.cells`, which these are tested against."""

import triton
import triton.language as tl

from throughtime.kernels.triton.exchange import joined


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, without losing what is small: a series below 0.3, where 1 − e^(−2|x|) would cancel."""
    magnitude = tl.abs(x)
    square = x * x
    series = -1382.0 / 155925.0 * square + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    power = tl.exp(-2.0 * magnitude)
    large = (1.0 - power) / (1.0 + power)
    return tl.where(magnitude < 0.3, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^−x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def numbers(tile, KIND: tl.constexpr, HALVES: tl.constexpr):
    """Return the numbers that a tile of integers holds; of two in one, the lower half is the first."""
    if HALVES:
        bits = tile.to(tl.uint32, bitcast=True)
        low = (bits & 0xFFFF).to(tl.uint16).to(KIND, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(KIND, bitcast=True)
        return tl.reshape(tl.join(low, high), [tile.shape[0], tile.shape[1], 2 * tile.shape[2]])
    return tile.to(KIND, bitcast=True)


@triton.jit
def product(
    t_0,
    t_1,
    t_2,
    t_3,
    w_0,
    w_1,
    w_2,
    w_3,
    CHUNKS: tl.constexpr,
    KIND: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return rows times a weight, both cut along the depth: in chunks one after the other, and each in pieces for the warps."""
    total = tl.dot(numbers(t_0, KIND, HALVES), w_0, input_precision=PRECISION, out_dtype=tl.float32)
    if CHUNKS > 1:
        total = tl.dot(numbers(t_1, KIND, HALVES), w_1, total, input_precision=PRECISION, out_dtype=tl.float32)
    if CHUNKS > 2:
        total = tl.dot(numbers(t_2, KIND, HALVES), w_2, total, input_precision=PRECISION, out_dtype=tl.float32)
    if CHUNKS > 3:
        total = tl.dot(numbers(t_3, KIND, HALVES), w_3, total, input_precision=PRECISION, out_dtype=tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def cut(tile, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Cut a tile (rows, units · 4) in its four gates (rows, units)."""
    even, odd = tl.split(tl.reshape(tile, [ROWS, UNITS, 2, 2]))
    g_0, g_2 = tl.split(even)
    g_1, g_3 = tl.split(odd)
    return g_0, g_1, g_2, g_3


@triton.jit
def paste(g_0, g_1, g_2, g_3, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Put four gates (rows, units) side by side: the inverse of `cut`."""
    return tl.reshape(tl.join(tl.join(g_0, g_2), tl.join(g_1, g_3)), [ROWS, 4 * UNITS])


@triton.jit
def standardised(
    base,
    values,
    is_in,
    gates: tl.constexpr,
    active,
    hidden,
    parts,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Return (values − μ) / √(σ² + ε), μ and the scale, of rows whose units are divided among programs (Chan et al., 1979)."""
    count = (gates * tl.minimum(UNITS, hidden - tl.program_id(0) * UNITS)).to(tl.float32)
    own = tl.sum(tl.where(is_in, values, 0.0), axis=1) / count
    distance = tl.where(is_in, values - own[:, None], 0.0)
    means, squares = joined(base, own, tl.sum(distance * distance, axis=1), active, parts, ROWS, PARTS, COPIES)
    each = tl.arange(0, PARTS)
    counts = (gates * tl.maximum(tl.minimum(UNITS, hidden - each * UNITS), 0)).to(tl.float32)[None, :]
    total = (gates * hidden).to(tl.float32)
    mean = tl.sum(means * counts, axis=1) / total
    apart = means - mean[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(squares + counts * apart * apart, axis=1) / total + 1e-5)
    return tl.where(is_in, (values - mean[:, None]) * scale[:, None], 0.0), mean, scale


@triton.jit
def standardised_backward(
    base,
    grad,
    standard,
    scale,
    gates: tl.constexpr,
    active,
    hidden,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Carry a gradient, zero where nothing was standardised, back over `standardised`."""
    sums, alongs = joined(
        base, tl.sum(grad, axis=1), tl.sum(grad * standard, axis=1), active, parts, ROWS, PARTS, COPIES
    )
    mean = tl.sum(sums, axis=1) / (gates * hidden)
    along = tl.sum(alongs, axis=1) / (gates * hidden)
    return (grad - mean[:, None] - standard * along[:, None]) * scale[:, None]
