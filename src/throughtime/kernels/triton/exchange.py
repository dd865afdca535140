"""How the programs of one launch hand numbers to each other: through memory that says of itself whether it has been written.

The hidden units of a layer are divided among programs, each of which keeps its part of W_hh on its multiprocessor for all
steps. What one of them computes in a step all others need in the next. A barrier would cost a round trip to the L2 cache before
the data's own. So memory is filled with one bit pattern that no program stores, all ones, a NaN; and a program that needs a tile
loads it again until no element of it looks so. Each element is written once in a launch, and by itself: it isn't there yet, or
it is right. No fence is needed, and no number depends on who was first.

That ends only if all programs run at the same time, which a cooperative launch ensures. And only what a thread has seen itself
counts: a tile must have an element for each thread, or threads would hold copies of one that were loaded at different times.
"""

import torch
import triton
import triton.language as tl

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def unset(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory for numbers of `dtype` none of which has been written."""
    return torch.full(shape, -1, dtype=INTEGERS[dtype], device=device).view(dtype)


def as_set(tensor: torch.Tensor) -> torch.Tensor:
    """Return numbers none of which looks unset: such a NaN becomes another one."""
    bits = tensor.view(INTEGERS[tensor.dtype])
    return torch.where(bits == -1, -2, bits).view(tensor.dtype)


@triton.jit
def is_missing(tiles, HALVES: tl.constexpr):
    """Whether any number of the tiles isn't there. As unsigned numbers, nothing is larger than all ones."""
    if HALVES:
        top = larger_half(tiles[0])
        for chunk in tl.static_range(1, len(tiles)):
            top = tl.maximum(top, larger_half(tiles[chunk]))
        found = tl.max(top) >= 0xFFFF0000
    else:
        top = as_unsigned(tiles[0])
        for chunk in tl.static_range(1, len(tiles)):
            top = tl.maximum(top, as_unsigned(tiles[chunk]))
        ONES: tl.constexpr = 0xFFFF if tiles[0].dtype == tl.int16 else 0xFFFFFFFF
        found = tl.max(top) == ONES
    return found


@triton.jit
def as_unsigned(tile):
    """Return the bits of integers of 16 or 32 bits."""
    if tile.dtype == tl.int16:
        bits = tile.to(tl.uint16, bitcast=True)
    else:
        bits = tile.to(tl.uint32, bitcast=True)
    return bits


@triton.jit
def larger_half(tile):
    """Return, in its upper half, the larger half of each integer of 32 bits."""
    bits = tile.to(tl.uint32, bitcast=True)
    return tl.maximum(bits, bits << 16)


@triton.jit
def depths(PIECES: tl.constexpr, CHUNK: tl.constexpr):
    """Return the places of a chunk, cut in pieces: (PIECES, CHUNK / PIECES), or (CHUNK,) where it isn't cut."""
    DEPTH: tl.constexpr = CHUNK // PIECES
    if PIECES > 1:
        found = tl.arange(0, PIECES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    else:
        found = tl.arange(0, CHUNK)
    return found


@triton.jit
def load_tiles(base, width, is_wanted, PIECES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Load a row's integers, chunk by chunk; zeros where a row isn't wanted and beyond its width."""
    depth = depths(PIECES, CHUNK)
    if PIECES > 1:
        depth = depth[:, None, :]
        base = base[None, :, None]
        is_wanted = is_wanted[None, :, None]
    else:
        depth = depth[None, :]
        base = base[:, None]
        is_wanted = is_wanted[:, None]
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        at = chunk * CHUNK + depth
        tiles = tiles + (tl.load(base + at, mask=is_wanted & (at < width), other=0, volatile=True),)
    return tiles


@triton.jit
def arrived_tiles(
    base, width, is_wanted, PIECES: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HALVES: tl.constexpr
):
    """Load rows that other programs write, as soon as all of them is there: tiles (rows, CHUNK), or (PIECES, rows, CHUNK / PIECES).

    Args:
        base: Where each row begins, pointers to integers.
        width: Integers of a row.
        is_wanted: Which rows; the others are zeros.
        PIECES: In how many pieces a chunk is cut.
        CHUNK: Integers of a chunk.
        CHUNKS: Chunks of a row.
        HALVES: Whether an integer holds two numbers.
    """
    tiles = load_tiles(base, width, is_wanted, PIECES, CHUNK, CHUNKS)
    while is_missing(tiles, HALVES):
        tiles = load_tiles(base, width, is_wanted, PIECES, CHUNK, CHUNKS)
    return tiles


@triton.jit
def publish(pointers, values, mask, KIND: tl.constexpr):
    """Round values to the dtype KIND and store them for other programs; a NaN that looks unset becomes another NaN."""
    bits = values.to(KIND).to(pointers.dtype.element_ty, bitcast=True)
    tl.store(pointers, tl.where(bits == -1, -2, bits).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def joined(base, one, other, active, parts, ROWS: tl.constexpr, PARTS: tl.constexpr, COPIES: tl.constexpr):
    """Publish two numbers of each row and load those of all programs: two tiles (ROWS, PARTS).

    `base` points, for each row, to two numbers of each program. Each is loaded COPIES times, so that there is one for each thread.
    """
    part = tl.program_id(0)
    publish(base + 2 * part, one, active, tl.float32)
    publish(base + 2 * part + 1, other, active, tl.float32)
    each = tl.arange(0, 2 * PARTS)
    pointers = base[:, None, None] + each[None, :, None] + tl.zeros([1, 1, COPIES], dtype=tl.int32)
    mask = active[:, None, None] & (each < 2 * parts)[None, :, None] & (tl.zeros([1, 1, COPIES], dtype=tl.int32) == 0)
    tile = tl.load(pointers, mask=mask, other=0, volatile=True)
    while tl.max(as_unsigned(tile)) == 0xFFFFFFFF:
        tile = tl.load(pointers, mask=mask, other=0, volatile=True)
    tile = tl.max(tile.to(tl.float32, bitcast=True), axis=2)
    return tl.split(tl.reshape(tile, [ROWS, PARTS, 2]))
