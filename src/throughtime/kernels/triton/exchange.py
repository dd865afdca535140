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
def any_missing(t_0, t_1, t_2, t_3, CHUNKS: tl.constexpr, HALVES: tl.constexpr):
    """Whether any of the first CHUNKS tiles isn't all there."""
    if HALVES:
        bits = t_0.to(tl.uint32, bitcast=True)
        top = tl.maximum(bits, bits << 16)
        if CHUNKS > 1:
            bits = t_1.to(tl.uint32, bitcast=True)
            top = tl.maximum(top, tl.maximum(bits, bits << 16))
        if CHUNKS > 2:
            bits = t_2.to(tl.uint32, bitcast=True)
            top = tl.maximum(top, tl.maximum(bits, bits << 16))
        if CHUNKS > 3:
            bits = t_3.to(tl.uint32, bitcast=True)
            top = tl.maximum(top, tl.maximum(bits, bits << 16))
        return tl.max(top) >= 0xFFFF0000
    is_unset = t_0 == -1
    if CHUNKS > 1:
        is_unset |= t_1 == -1
    if CHUNKS > 2:
        is_unset |= t_2 == -1
    if CHUNKS > 3:
        is_unset |= t_3 == -1
    return tl.max(is_unset.to(tl.int32)) > 0


@triton.jit
def load_chunks(base, depth, width, is_wanted, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Load a row's integers, chunk by chunk; zeros where a row isn't wanted and beyond its width."""
    t_0 = tl.load(base + depth, mask=is_wanted & (depth < width), other=0, volatile=True)
    t_1 = t_0
    t_2 = t_0
    t_3 = t_0
    if CHUNKS > 1:
        t_1 = tl.load(base + depth + CHUNK, mask=is_wanted & (depth + CHUNK < width), other=0, volatile=True)
    if CHUNKS > 2:
        t_2 = tl.load(base + depth + 2 * CHUNK, mask=is_wanted & (depth + 2 * CHUNK < width), other=0, volatile=True)
    if CHUNKS > 3:
        t_3 = tl.load(base + depth + 3 * CHUNK, mask=is_wanted & (depth + 3 * CHUNK < width), other=0, volatile=True)
    return t_0, t_1, t_2, t_3


@triton.jit
def arrived_rows(
    base,
    width,
    is_wanted,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Load rows that other programs write, as soon as all of them is there: up to four chunks (PIECES, ROWS, CHUNK / PIECES).

    Args:
        base: Where each row begins, pointers to integers.
        width: Integers of a row.
        is_wanted: Which rows; the others are zeros.
        PIECES: In how many pieces a chunk is cut.
        ROWS: How many rows there are.
        CHUNK: Integers of a chunk.
        CHUNKS: Chunks of a row.
        HALVES: Whether an integer holds two numbers.
    """
    DEPTH: tl.constexpr = CHUNK // PIECES
    depth = (tl.arange(0, PIECES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])[:, None, :]
    base = base[None, :, None]
    is_wanted = is_wanted[None, :, None]
    t_0, t_1, t_2, t_3 = load_chunks(base, depth, width, is_wanted, CHUNK, CHUNKS)
    while any_missing(t_0, t_1, t_2, t_3, CHUNKS, HALVES):
        t_0, t_1, t_2, t_3 = load_chunks(base, depth, width, is_wanted, CHUNK, CHUNKS)
    return t_0, t_1, t_2, t_3


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
    while tl.max((tile == -1).to(tl.int32)) > 0:
        tile = tl.load(pointers, mask=mask, other=0, volatile=True)
    tile = tl.max(tile.to(tl.float32, bitcast=True), axis=2)
    return tl.split(tl.reshape(tile, [ROWS, PARTS, 2]))
