"""What a step computes for a tile of rows and units: the equations of `throughtime.cells`, which these are tested against."""

import triton
import triton.language as tl

from throughtime.kernels.triton.exchange import depths, joined


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
def load_weights(
    rows,
    is_row,
    width,
    KIND: tl.constexpr,
    HALVES: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Load rows of a weight, transposed, as `product` wants them: tiles (CHUNK, rows), or (PIECES, CHUNK / PIECES, rows).

    Args:
        rows: Where each begins, pointers to integers.
        is_row: Which of them there are.
        width: Integers of a row.
        KIND: Dtype of the numbers.
        HALVES: Whether an integer holds two: then each chunk has two tiles, of the even numbers and of the odd.
        PIECES: In how many pieces a chunk is cut.
        CHUNK: Integers of a chunk.
        CHUNKS: How many chunks.
    """
    depth = depths(PIECES, CHUNK)
    if PIECES > 1:
        depth = depth[:, :, None]
        rows = rows[None, None, :]
        is_row = is_row[None, None, :]
    else:
        depth = depth[:, None]
        rows = rows[None, :]
        is_row = is_row[None, :]
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        at = chunk * CHUNK + depth
        tile = tl.load(rows + at, mask=is_row & (at < width), other=0)
        if HALVES:
            tiles = tiles + (lower_half(tile, KIND), upper_half(tile, KIND))
        else:
            tiles = tiles + (tile.to(KIND, bitcast=True),)
    return tiles


@triton.jit
def lower_half(tile, KIND: tl.constexpr):
    """Return the first of the two numbers in each integer."""
    return (tile.to(tl.uint32, bitcast=True) & 0xFFFF).to(tl.uint16).to(KIND, bitcast=True)


@triton.jit
def upper_half(tile, KIND: tl.constexpr):
    """Return the second."""
    return (tile.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(KIND, bitcast=True)


@triton.jit
def product(tiles, weights, KIND: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """Return rows times a weight: the tiles of `arrived_tiles` and of `load_weights`.

    Two sums that don't wait for each other take half the time of one.
    """
    if HALVES:
        total = tl.dot(lower_half(tiles[0], KIND), weights[0], input_precision=PRECISION, out_dtype=tl.float32)
        other = tl.dot(upper_half(tiles[0], KIND), weights[1], input_precision=PRECISION, out_dtype=tl.float32)
        for chunk in tl.static_range(1, len(tiles)):
            low = lower_half(tiles[chunk], KIND)
            high = upper_half(tiles[chunk], KIND)
            total = tl.dot(low, weights[2 * chunk], total, input_precision=PRECISION, out_dtype=tl.float32)
            other = tl.dot(high, weights[2 * chunk + 1], other, input_precision=PRECISION, out_dtype=tl.float32)
        total += other
    else:
        total = tl.dot(tiles[0].to(KIND, bitcast=True), weights[0], input_precision=PRECISION, out_dtype=tl.float32)
        for chunk in tl.static_range(1, len(tiles)):
            own = tiles[chunk].to(KIND, bitcast=True)
            total = tl.dot(own, weights[chunk], total, input_precision=PRECISION, out_dtype=tl.float32)
    if len(total.shape) > 2:
        total = tl.sum(total, axis=0)
    return total


@triton.jit
def load_gates(base, count: tl.constexpr, stride, is_loaded):
    """Load `count` gates of units, `stride` apart; zeros for the others of four."""
    tiles = ()
    for gate in tl.static_range(4):
        if gate < count:
            tiles = tiles + (tl.load(base + gate * stride, mask=is_loaded, other=0.0),)
        else:
            tiles = tiles + (tl.zeros(is_loaded.shape, dtype=tl.float32),)
    return tiles


@triton.jit
def store_gates(base, tiles, count: tl.constexpr, stride, is_stored):
    """Store the first `count` tiles, `stride` apart."""
    for gate in tl.static_range(count):
        tl.store(base + gate * stride, tiles[gate].to(base.dtype.element_ty), mask=is_stored)


@triton.jit
def cut(tile, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Cut a tile (rows, units · 4) in its four gates (rows, units)."""
    even, odd = tl.split(tl.reshape(tile, [ROWS, UNITS, 2, 2]))
    g_0, g_2 = tl.split(even)
    g_1, g_3 = tl.split(odd)
    return g_0, g_1, g_2, g_3


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
def joined_means(
    base,
    along_one,
    along_standard,
    count,
    active,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """Return what standardising `count` numbers takes off their gradient: its mean, and its mean along what was standardised.

    Given are this program's sums over its units.
    """
    sums, alongs = joined(base, along_one, along_standard, active, parts, ROWS, PARTS, COPIES)
    return tl.sum(sums, axis=1)[:, None] / count, tl.sum(alongs, axis=1)[:, None] / count
