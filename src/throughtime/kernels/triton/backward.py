"""The backward pass: the programs of the forward pass, from the last step to the first.

A program turns the gradient of its units' h_t into those of what its gates are made of, which it publishes; then it takes all
units' times its columns of W_hh, the gradient of its own units' h_{t−1}. Places and columns are those of the forward pass.
"""

import triton
import triton.language as tl

from throughtime.kernels.triton.arithmetic import (
    joined_means,
    load_gates,
    load_weights,
    product,
    store_gates,
    tanh,
)
from throughtime.kernels.triton.exchange import arrived_tiles, publish
from throughtime.kernels.triton.forward import begins_at


@triton.jit
def add_up(totals, which, hidden, units, is_unit, values):
    """Store the sum over a program's rows."""
    tl.store(totals + which * hidden + units, tl.sum(values, axis=0), mask=is_unit)


@triton.jit
def place_of(t, offsets, steps, batch, b):
    """Return where a step's rows stand; of packed rows, those of the nearest step that there is."""
    if offsets is not None:
        place = tl.load(offsets + tl.minimum(tl.maximum(t, 0), steps - 1)) + b
    else:
        place = t.to(tl.int64) * batch + b
    return place


@triton.jit
def load_step(
    t,
    place,
    before,
    begin,
    way,
    length,
    b,
    units,
    is_unit,
    batch,
    hidden,
    grad_output,
    saved,
    cells,
    scales,
    output,
    zoneout_h,
    zoneout_c,
    gain_hh,
    BASE: tl.constexpr,
    WAYS: tl.constexpr,
    GATES: tl.constexpr,
    SLOTS: tl.constexpr,
    SAVED: tl.constexpr,
):
    """Load what a step reads that no other program writes now; zeros where a cell doesn't have it.

    Returns ∂output, the four numbers of each unit that the forward pass saved, c_{t−1} or h_{t−1}, four standardised numbers, their
    scale, the mean and scale of what was standardised second, and the masks of zoneout.
    """
    active = (t >= 0) & (t < length)
    stored = active[:, None] & is_unit[None, :]
    nothing = tl.zeros(stored.shape, dtype=tl.float32)
    at = place * WAYS + way
    own = (at * hidden)[:, None] + units[None, :]
    own_before = ((before * WAYS + way) * hidden)[:, None] + units[None, :]
    continued = stored & (begin == 0)[:, None]
    grad_own = tl.load(grad_output + own, mask=stored, other=0.0)
    of_slots = saved + (at * SLOTS * hidden)[:, None] + units[None, :]
    k_0, k_1, k_2, k_3 = load_gates(of_slots, SAVED, hidden, stored)
    if BASE == "lstm":
        state = tl.load(cells + own_before, mask=continued, other=0.0)
    elif GATES > 1:
        state = tl.load(output + own_before, mask=continued, other=0.0)
    else:
        state = nothing
    if gain_hh is not None:
        s_0, s_1, s_2, s_3 = load_gates(of_slots + (SLOTS - GATES) * hidden, GATES, hidden, stored)
        scale_u = tl.load(scales + at * 3, mask=active, other=0.0)
        mean_n = tl.load(scales + at * 3 + 1, mask=active, other=0.0)
        scale_n = tl.load(scales + at * 3 + 2, mask=active, other=0.0)
    else:
        s_0, s_1, s_2, s_3 = nothing, nothing, nothing, nothing
        scale_u = tl.zeros(active.shape, dtype=tl.float32)
        mean_n, scale_n = scale_u, scale_u
    of_masks = (t.to(tl.int64) * batch + b)[:, None] * hidden + units[None, :]
    keeps_h, keeps_c = stored, stored
    if zoneout_h is not None:
        keeps_h = tl.load(zoneout_h + of_masks, mask=stored, other=0) != 0
    if zoneout_c is not None:
        keeps_c = tl.load(zoneout_c + of_masks, mask=stored, other=0) != 0
    return grad_own, k_0, k_1, k_2, k_3, state, s_0, s_1, s_2, s_3, scale_u, mean_n, scale_n, keeps_h, keeps_c


@triton.jit
def backward_loop(
    weight_words,  # W_hh transposed (D, H, G, H), as integers that are loaded
    weight_ch,  # as in `forward_loop`, as is what follows
    gain_hh,
    gain_c,
    shift_c,
    h_0,
    c_0,
    zoneout_h,
    zoneout_c,
    dropped,
    offsets,
    order,
    lengths,
    begins,
    output,  # h_t (places, D, H)
    saved,
    cells,
    scales,
    grad_output,  # (places, D, H)
    grad_h_n,  # (D, B, H)
    grad_c_n,
    flow,  # (places, D, G, H), unset: the gradient of W_hh h_in
    flow_words,
    inner,  # (places, D, G, H): that of W_ih x + b, or None where it is `flow`
    sums,
    grad_h_0,  # (D, B, H)
    grad_c_0,
    totals,  # (D, groups of rows, 10, H): gradients of gain_hh (4), gain_c, shift_c, weight_ch (3), bias_n; or None
    first_row,
    groups,
    batch,
    steps,
    hidden,
    share_h,
    share_c,
    BASE: tl.constexpr,
    COUPLED: tl.constexpr,
    EXPECTED_H: tl.constexpr,
    EXPECTED_C: tl.constexpr,
    WAYS: tl.constexpr,
    REVERSE: tl.constexpr,
    GATES: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_N: tl.constexpr,  # of the second product
    CHUNK: tl.constexpr,  # words; CHUNKS of them cover G H, or 2 H of a GRU whose reset gate acts before the product
    CHUNKS: tl.constexpr,
    CHUNKS_N: tl.constexpr,  # these cover H
    KIND: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take a program's rows and units from the last step to the first."""
    way = tl.program_id(2)
    parts = tl.num_programs(0)
    is_reverse = way + REVERSE
    ahead = 1 - 2 * is_reverse
    rows = first_row + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = rows < batch
    b = rows
    if order is not None:
        b = tl.load(order + rows, mask=is_row, other=0)
    length = tl.where(is_row, steps, 0)
    if lengths is not None:
        length = tl.load(lengths + rows, mask=is_row, other=0)
    last = tl.max(length)

    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    is_unit = units < hidden
    is_owned = is_row[:, None] & is_unit[None, :]
    FED: tl.constexpr = 2 if BASE == "gru_reset_before" else GATES
    SAVED: tl.constexpr = 4 if BASE == "gru" else GATES
    WIDTH: tl.constexpr = 2 if HALVES else 1
    width = hidden // WIDTH  # of a gate
    rows_fed = weight_words + (way * hidden + units) * GATES * width
    weights = load_weights(rows_fed, is_unit, FED * width, KIND, HALVES, PIECES, CHUNK, CHUNKS)
    if BASE == "gru_reset_before":
        rows_n = rows_fed + 2 * width
        weights_n = load_weights(rows_n, is_unit, width, KIND, HALVES, PIECES_N, CHUNK, CHUNKS_N)

    own = (way * batch + b)[:, None] * hidden + units[None, :]
    grad_h = tl.load(grad_h_n + own, mask=is_owned, other=0.0).to(tl.float32)
    nothing = tl.zeros_like(grad_h)
    grad_h_start = nothing
    grad_c = nothing
    grad_c_start = nothing
    c_start = nothing
    h_start = tl.load(h_0 + own, mask=is_owned, other=0.0).to(tl.float32)
    if BASE == "lstm":
        grad_c = tl.load(grad_c_n + own, mask=is_owned, other=0.0).to(tl.float32)
        c_start = tl.load(c_0 + own, mask=is_owned, other=0.0).to(tl.float32)
    if dropped is not None:
        drop = tl.load(dropped + b[:, None] * hidden + units[None, :], mask=is_owned, other=0.0).to(tl.float32)

    of_units = units[None, :]
    if gain_hh is not None:
        gains = load_gates(gain_hh + way * GATES * hidden + of_units, GATES, hidden, is_unit[None, :])
    if gain_c is not None:
        g_c = tl.load(gain_c + way * hidden + units, mask=is_unit, other=0.0)[None, :]
        s_c = tl.load(shift_c + way * hidden + units, mask=is_unit, other=0.0)[None, :]
    if weight_ch is not None:
        peep = weight_ch + way * (GATES - 1) * hidden + units
        p_f = tl.load(peep + (GATES - 3) * hidden, mask=is_unit, other=0.0)[None, :]
        p_o = tl.load(peep + (GATES - 2) * hidden, mask=is_unit, other=0.0)[None, :]
        if not COUPLED:
            p_i = tl.load(peep, mask=is_unit, other=0.0)[None, :]
    total_gain_0 = nothing
    total_gain_1 = nothing
    total_gain_2 = nothing
    total_gain_3 = nothing
    total_gain_c = nothing
    total_shift_c = nothing
    total_p_i = nothing
    total_p_f = nothing
    total_p_o = nothing
    total_b_n = nothing
    PHASES: tl.constexpr = 2 if BASE == "lstm" or BASE == "gru_reset_before" else 1

    # What doesn't depend on the steps after this one is asked for a step ahead, and loaded in the layout that stores it.
    t = (1 - is_reverse) * (last - 1)
    begin = begins_at(t, begins, way, steps, batch, b, length, is_reverse)
    began = length < 0
    after = b.to(tl.int64)
    place = place_of(t, offsets, steps, batch, b)
    before = place_of(t - ahead, offsets, steps, batch, b)
    asked = load_step(
        *(t, place, before, begin),
        *(way, length, b, units, is_unit, batch, hidden),
        *(grad_output, saved, cells, scales, output, zoneout_h, zoneout_c, gain_hh),
        *(BASE, WAYS, GATES, SLOTS, SAVED),
    )
    for step in range(last + 1):
        t = (1 - is_reverse) * (last - 1) - step * ahead
        t_after = t + ahead
        active = (t >= 0) & (t < length)
        came = (t_after >= 0) & (t_after < length)
        at = place * WAYS + way
        stored = active[:, None] & is_unit[None, :]

        of_after = flow_words + (after * WAYS + way) * GATES * width
        tiles = arrived_tiles(of_after, FED * width, came, PIECES, CHUNK, CHUNKS, HALVES)
        fed = product(tiles, weights, KIND, HALVES, PRECISION)

        # The next step's are on their way while this one is computed, or, where registers are scarce, while it is waited for.
        begins_next = begins_at(t - ahead, begins, way, steps, batch, b, length, is_reverse)
        before_next = place_of(t - 2 * ahead, offsets, steps, batch, b)
        if gain_hh is None:
            coming = load_step(
                *(t - ahead, before, before_next, begins_next),
                *(way, length, b, units, is_unit, batch, hidden),
                *(grad_output, saved, cells, scales, output, zoneout_h, zoneout_c, gain_hh),
                *(BASE, WAYS, GATES, SLOTS, SAVED),
            )
        grad_own, k_0, k_1, k_2, k_3, state_before, s_0, s_1, s_2, s_3, scale_u, mean_n, scale_n, keeps_h, keeps_c = (
            asked
        )
        grad_own = grad_own.to(tl.float32)
        k_0, k_1, k_2, k_3 = k_0.to(tl.float32), k_1.to(tl.float32), k_2.to(tl.float32), k_3.to(tl.float32)
        s_0, s_1, s_2, s_3 = s_0.to(tl.float32), s_1.to(tl.float32), s_2.to(tl.float32), s_3.to(tl.float32)
        state_before = state_before.to(tl.float32)

        if dropped is not None:
            fed *= drop
        grad_h += tl.where(came[:, None], fed, 0.0)
        if begins is not None:
            grad_h_start += tl.where(began[:, None], grad_h, 0.0)
            grad_h = tl.where(began[:, None], 0.0, grad_h)
            if BASE == "lstm":
                grad_c_start += tl.where(began[:, None], grad_c, 0.0)
                grad_c = tl.where(began[:, None], 0.0, grad_c)

        total = grad_h + grad_own
        past = nothing  # what goes to h_{t−1} past the step, by zoneout
        if EXPECTED_H:
            past = share_h * total
            total *= 1.0 - share_h
        elif zoneout_h is not None:
            past = tl.where(keeps_h, total, 0.0)
            total = tl.where(keeps_h, 0.0, total)

        if BASE == "lstm":
            c_before = tl.where(begin[:, None], c_start, state_before)
            if COUPLED:
                f, g, o = k_0, k_1, k_2
                i = 1.0 - f
            else:
                i, f, g, o = k_0, k_1, k_2, k_3
            total_c = grad_c
            past_c = nothing
            if EXPECTED_C:
                past_c = share_c * total_c
                total_c *= 1.0 - share_c
            elif zoneout_c is not None:
                past_c = tl.where(keeps_c, total_c, 0.0)
                total_c = tl.where(keeps_c, 0.0, total_c)
            c = f * c_before + i * g
            if gain_c is not None:
                standard = tl.where(stored, (c - mean_n[:, None]) * scale_n[:, None], 0.0)
                squashed = tanh(standard * g_c + s_c)
                grad_n = tl.where(stored, total * o * (1.0 - squashed * squashed), 0.0)
                total_gain_c += grad_n * standard
                total_shift_c += grad_n
                base = sums + at * PHASES * parts * 2
                grad_n *= g_c
                along = tl.sum(grad_n * standard, axis=1)
                mean, along = joined_means(
                    base, tl.sum(grad_n, axis=1), along, hidden, active, parts, ROWS, PARTS, COPIES
                )
                grad_n = (grad_n - mean - standard * along) * scale_n[:, None]
            else:
                squashed = tanh(c)
                grad_n = total * o * (1.0 - squashed * squashed)
            a_o = total * squashed * o * (1.0 - o)
            total_c += grad_n
            if weight_ch is not None:
                total_c += a_o * p_o
            if COUPLED:
                a_f = total_c * (c_before - g) * f * (1.0 - f)
            else:
                a_f = total_c * c_before * f * (1.0 - f)
                a_i = total_c * g * i * (1.0 - i)
            a_g = total_c * i * (1.0 - g * g)
            direct_c = total_c * f + past_c
            if weight_ch is not None:
                direct_c += a_f * p_f
                total_p_f += tl.where(stored, a_f * c_before, 0.0)
                total_p_o += tl.where(stored, a_o * c, 0.0)
                if not COUPLED:
                    direct_c += a_i * p_i
                    total_p_i += tl.where(stored, a_i * c_before, 0.0)
            grad_c = tl.where(active[:, None], direct_c, grad_c)
            direct = past
            if COUPLED:
                a_0, a_1, a_2, a_3 = a_f, a_g, a_o, nothing
            else:
                a_0, a_1, a_2, a_3 = a_i, a_f, a_g, a_o
            u_2 = a_2
        elif BASE == "gru" or BASE == "gru_reset_before":
            h_before = tl.where(begin[:, None], h_start, state_before)
            r, z, n, u_n = k_0, k_1, k_2, k_3
            a_n = total * (1.0 - z) * (1.0 - n * n)
            a_z = total * (h_before - n) * z * (1.0 - z)
            direct = total * z + past
            if BASE == "gru":
                a_r = a_n * u_n * r * (1.0 - r)
                u_2 = a_n * r
                if totals is not None:
                    total_b_n += tl.where(stored, u_2, 0.0)
            else:
                u_2 = tl.where(stored, a_n, 0.0)
                if gain_hh is not None:
                    total_gain_2 += u_2 * s_2
                    base = sums + (at * PHASES + 1) * parts * 2
                    u_2 *= gains[2]
                    along = tl.sum(u_2 * s_2, axis=1)
                    mean, along = joined_means(
                        base, tl.sum(u_2, axis=1), along, hidden, active, parts, ROWS, PARTS, COPIES
                    )
                    u_2 = (u_2 - mean - s_2 * along) * scale_n[:, None]
                publish(flow + ((at * GATES + 2) * hidden)[:, None] + of_units, u_2, stored, KIND)
                of_n = flow_words + (at * GATES + 2) * width
                tiles = arrived_tiles(of_n, width, active, PIECES_N, CHUNK, CHUNKS_N, HALVES)
                grad_v = product(tiles, weights_n, KIND, HALVES, PRECISION)
                through = grad_v * r
                a_r = grad_v * h_before * r * (1.0 - r)
                if dropped is not None:
                    through *= drop
                    a_r *= drop
                direct += through
            a_0, a_1, a_2, a_3 = a_r, a_z, a_n, nothing
        else:
            if BASE == "rnn_relu":
                a_0 = tl.where(k_0 > 0, total, 0.0)
            else:
                a_0 = total * (1.0 - k_0 * k_0)
            a_1, a_2, a_3 = nothing, nothing, nothing
            u_2 = nothing
            direct = past

        # What W_hh gets differs from what the input does: a GRU's n beyond its reset gate, and what normalisation makes of it.
        u_0, u_1, u_3 = a_0, a_1, a_3
        if gain_hh is not None:
            u_0 = tl.where(stored, u_0, 0.0)
            total_gain_0 += u_0 * s_0
            u_0 *= gains[0]
            all_sums = u_0
            all_along = u_0 * s_0
            if FED > 1:
                u_1 = tl.where(stored, u_1, 0.0)
                total_gain_1 += u_1 * s_1
                u_1 *= gains[1]
                all_sums += u_1
                all_along += u_1 * s_1
            if FED > 2:
                u_2 = tl.where(stored, u_2, 0.0)
                total_gain_2 += u_2 * s_2
                u_2 *= gains[2]
                all_sums += u_2
                all_along += u_2 * s_2
            if FED > 3:
                u_3 = tl.where(stored, u_3, 0.0)
                total_gain_3 += u_3 * s_3
                u_3 *= gains[3]
                all_sums += u_3
                all_along += u_3 * s_3
            PHASE: tl.constexpr = 1 if BASE == "lstm" else 0
            base = sums + (at * PHASES + PHASE) * parts * 2
            mean, along = joined_means(
                base,
                tl.sum(all_sums, axis=1),
                tl.sum(all_along, axis=1),
                FED * hidden,
                active,
                parts,
                ROWS,
                PARTS,
                COPIES,
            )
            u_0 = (u_0 - mean - s_0 * along) * scale_u[:, None]
            if FED > 1:
                u_1 = (u_1 - mean - s_1 * along) * scale_u[:, None]
            if FED > 2:
                u_2 = (u_2 - mean - s_2 * along) * scale_u[:, None]
            if FED > 3:
                u_3 = (u_3 - mean - s_3 * along) * scale_u[:, None]
        of_gates = (at * GATES * hidden)[:, None] + of_units
        publish(flow + of_gates, u_0, stored, KIND)
        if FED > 1:
            publish(flow + of_gates + hidden, u_1, stored, KIND)
        if FED > 2:
            publish(flow + of_gates + 2 * hidden, u_2, stored, KIND)
        if FED > 3:
            publish(flow + of_gates + 3 * hidden, u_3, stored, KIND)
        if inner is not None:
            store_gates(inner + of_gates, (a_0, a_1, a_2, a_3), GATES, hidden, stored)
        grad_h = tl.where(active[:, None], direct, grad_h)
        if gain_hh is not None:
            coming = load_step(
                *(t - ahead, before, before_next, begins_next),
                *(way, length, b, units, is_unit, batch, hidden),
                *(grad_output, saved, cells, scales, output, zoneout_h, zoneout_c, gain_hh),
                *(BASE, WAYS, GATES, SLOTS, SAVED),
            )
        began = begin & active
        begin = begins_next
        after = place
        place = before
        before = before_next
        asked = coming

    tl.store(grad_h_0 + own, (grad_h_start + grad_h).to(grad_h_0.dtype.element_ty), mask=is_owned)
    if BASE == "lstm":
        tl.store(grad_c_0 + own, (grad_c_start + grad_c).to(grad_c_0.dtype.element_ty), mask=is_owned)
    if totals is not None:
        mine = totals + (way * groups + first_row // ROWS + tl.program_id(1)) * 10 * hidden
        if gain_hh is not None:
            add_up(mine, 0, hidden, units, is_unit, total_gain_0)
            add_up(mine, 1, hidden, units, is_unit, total_gain_1)
            add_up(mine, 2, hidden, units, is_unit, total_gain_2)
            add_up(mine, 3, hidden, units, is_unit, total_gain_3)
        if gain_c is not None:
            add_up(mine, 4, hidden, units, is_unit, total_gain_c)
            add_up(mine, 5, hidden, units, is_unit, total_shift_c)
        if weight_ch is not None:
            add_up(mine, 6, hidden, units, is_unit, total_p_i)
            add_up(mine, 7, hidden, units, is_unit, total_p_f)
            add_up(mine, 8, hidden, units, is_unit, total_p_o)
        if BASE == "gru":
            add_up(mine, 9, hidden, units, is_unit, total_b_n)
