"""The backward pass: the programs of the forward pass, from the last step to the first.

A program turns the gradient of its units' h_t into those of what its gates are made of, which it publishes; then it takes all
units' times its columns of W_hh, the gradient of its own units' h_{t−1}. Places and columns are those of the forward pass.
"""

import triton
import triton.language as tl

from throughtime.kernels.triton.arithmetic import cut, paste, product, standardised_backward, tanh
from throughtime.kernels.triton.exchange import arrived_rows, publish


@triton.jit
def load_columns(weight, column, is_column, chunk, count, hidden, PIECES: tl.constexpr, CHUNK: tl.constexpr):
    """Load columns of `count` rows of W_hh, a chunk of the rows at a time, cut in pieces: (PIECES, CHUNK / PIECES, columns)."""
    DEPTH: tl.constexpr = CHUNK // PIECES
    row = chunk * CHUNK + (tl.arange(0, PIECES)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])[:, :, None]
    return tl.load(
        weight + row * hidden + column[None, None, :], mask=is_column[None, None, :] & (row < count), other=0.0
    )


@triton.jit
def add_up(totals, which, hidden, units, is_unit, values):
    """Store the sum over a program's rows."""
    tl.store(totals + which * hidden + units, tl.sum(values, axis=0), mask=is_unit)


@triton.jit
def backward_loop(
    weight,  # W_hh (D, G, H, H)
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
    CHUNK: tl.constexpr,  # CHUNKS · CHUNK ≥ G H, or 2 H of a GRU whose reset gate acts before the product
    CHUNKS: tl.constexpr,
    CHUNK_N: tl.constexpr,  # CHUNKS_N · CHUNK_N ≥ H
    CHUNKS_N: tl.constexpr,
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
    SIDE: tl.constexpr = 4 if GATES > 1 else 1
    column = tl.arange(0, SIDE * UNITS)
    gate = column % SIDE
    unit = tl.program_id(0) * UNITS + column // SIDE
    of_gate = gate * hidden + unit
    is_gate = (gate < GATES) & (unit < hidden)
    FED: tl.constexpr = 2 if BASE == "gru_reset_before" else GATES
    SAVED: tl.constexpr = 4 if BASE == "gru" else GATES
    is_fed = (gate < FED) & (unit < hidden)
    is_saved = (gate < SAVED) & (unit < hidden)
    WIDTH: tl.constexpr = 2 if HALVES else 1
    width = FED * hidden // WIDTH

    own_weight = weight + way * GATES * hidden * hidden
    w_0 = load_columns(own_weight, units, is_unit, 0, FED * hidden, hidden, PIECES, CHUNK)
    w_1 = w_0
    w_2 = w_0
    w_3 = w_0
    if CHUNKS > 1:
        w_1 = load_columns(own_weight, units, is_unit, 1, FED * hidden, hidden, PIECES, CHUNK)
    if CHUNKS > 2:
        w_2 = load_columns(own_weight, units, is_unit, 2, FED * hidden, hidden, PIECES, CHUNK)
    if CHUNKS > 3:
        w_3 = load_columns(own_weight, units, is_unit, 3, FED * hidden, hidden, PIECES, CHUNK)
    if BASE == "gru_reset_before":
        weight_n = own_weight + 2 * hidden * hidden
        n_0 = load_columns(weight_n, units, is_unit, 0, hidden, hidden, PIECES, CHUNK_N)
        n_1 = n_0
        n_2 = n_0
        n_3 = n_0
        if CHUNKS_N > 1:
            n_1 = load_columns(weight_n, units, is_unit, 1, hidden, hidden, PIECES, CHUNK_N)
        if CHUNKS_N > 2:
            n_2 = load_columns(weight_n, units, is_unit, 2, hidden, hidden, PIECES, CHUNK_N)
        if CHUNKS_N > 3:
            n_3 = load_columns(weight_n, units, is_unit, 3, hidden, hidden, PIECES, CHUNK_N)

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

    if gain_hh is not None:
        gain = tl.load(gain_hh + way * GATES * hidden + of_gate, mask=is_fed, other=0.0)[None, :]
        if BASE == "gru_reset_before":
            gain_n = tl.load(gain_hh + (way * GATES + 2) * hidden + units, mask=is_unit, other=0.0)[None, :]
    if gain_c is not None:
        g_c = tl.load(gain_c + way * hidden + units, mask=is_unit, other=0.0)[None, :]
        s_c = tl.load(shift_c + way * hidden + units, mask=is_unit, other=0.0)[None, :]
    if weight_ch is not None:
        peep = weight_ch + way * (GATES - 1) * hidden + units
        p_f = tl.load(peep + (GATES - 3) * hidden, mask=is_unit, other=0.0)[None, :]
        p_o = tl.load(peep + (GATES - 2) * hidden, mask=is_unit, other=0.0)[None, :]
        if not COUPLED:
            p_i = tl.load(peep, mask=is_unit, other=0.0)[None, :]
    total_gain = tl.zeros([ROWS, SIDE * UNITS], dtype=tl.float32)
    total_gain_n = nothing
    total_gain_c = nothing
    total_shift_c = nothing
    total_p_i = nothing
    total_p_f = nothing
    total_p_o = nothing
    total_b_n = nothing
    PHASES: tl.constexpr = 2 if BASE == "lstm" or BASE == "gru_reset_before" else 1

    for step in range(last + 1):
        t = (1 - is_reverse) * (last - 1) - step * ahead
        t_after = t + ahead
        active = (t >= 0) & (t < length)
        came = (t_after >= 0) & (t_after < length)
        if offsets is not None:
            place = tl.load(offsets + tl.minimum(tl.maximum(t, 0), steps - 1)) + b
            after = tl.load(offsets + tl.minimum(tl.maximum(t_after, 0), steps - 1)) + b
            before = tl.load(offsets + tl.minimum(tl.maximum(t - ahead, 0), steps - 1)) + b
        else:
            place = t.to(tl.int64) * batch + b
            after = place + ahead * batch
            before = place - ahead * batch
        at = place * WAYS + way
        begin = t == is_reverse * (length - 1)
        if begins is not None:
            of_step = (way * steps + t).to(tl.int64) * batch + b
            begin |= tl.load(begins + of_step, mask=active, other=0) != 0
            began = tl.load(begins + of_step + ahead * batch, mask=came, other=0) != 0
        stored = active[:, None] & is_unit[None, :]
        continued = (active & (begin == 0))[:, None] & is_unit[None, :]
        own_place = (at * hidden)[:, None] + units[None, :]
        own_before = ((before * WAYS + way) * hidden)[:, None] + units[None, :]

        # What does not depend on the steps after this one is asked for before they are waited for.
        grad_own = tl.load(grad_output + own_place, mask=stored, other=0.0).to(tl.float32)
        if GATES > 1:
            kept = tl.load(
                saved + (at * SLOTS * hidden)[:, None] + of_gate[None, :],
                mask=active[:, None] & is_saved[None, :],
                other=0.0,
            ).to(tl.float32)
        else:
            kept = tl.load(saved + (at * SLOTS * hidden)[:, None] + units[None, :], mask=stored, other=0.0).to(
                tl.float32
            )
        if BASE == "lstm":
            c_before = tl.load(cells + own_before, mask=continued, other=0.0).to(tl.float32)
        elif GATES > 1:
            h_before = tl.load(output + own_before, mask=continued, other=0.0).to(tl.float32)

        t_0, t_1, t_2, t_3 = arrived_rows(
            flow_words + (after * WAYS + way) * (GATES * hidden // WIDTH),
            width,
            came,
            PIECES,
            ROWS,
            CHUNK // WIDTH,
            CHUNKS,
            HALVES,
        )
        fed = product(t_0, t_1, t_2, t_3, w_0, w_1, w_2, w_3, CHUNKS, KIND, HALVES, PRECISION)
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
            keeps = tl.load(
                zoneout_h + (t.to(tl.int64) * batch + b)[:, None] * hidden + units[None, :], mask=stored, other=0
            )
            past = tl.where(keeps != 0, total, 0.0)
            total = tl.where(keeps != 0, 0.0, total)

        if BASE == "lstm":
            c_before = tl.where(begin[:, None], c_start, c_before)
            if COUPLED:
                f, g, o, i = cut(kept, ROWS, UNITS)
                i = 1.0 - f
            else:
                i, f, g, o = cut(kept, ROWS, UNITS)
            total_c = grad_c
            past_c = nothing
            if EXPECTED_C:
                past_c = share_c * total_c
                total_c *= 1.0 - share_c
            elif zoneout_c is not None:
                keeps = tl.load(
                    zoneout_c + (t.to(tl.int64) * batch + b)[:, None] * hidden + units[None, :], mask=stored, other=0
                )
                past_c = tl.where(keeps != 0, total_c, 0.0)
                total_c = tl.where(keeps != 0, 0.0, total_c)
            c = f * c_before + i * g
            if gain_c is not None:
                mean = tl.load(scales + at * 3 + 1, mask=active, other=0.0)
                scale = tl.load(scales + at * 3 + 2, mask=active, other=0.0)
                standard = tl.where(stored, (c - mean[:, None]) * scale[:, None], 0.0)
                squashed = tanh(standard * g_c + s_c)
                grad_n = tl.where(stored, total * o * (1.0 - squashed * squashed), 0.0)
                total_gain_c += grad_n * standard
                total_shift_c += grad_n
                base = sums + at * PHASES * parts * 2
                grad_n = standardised_backward(
                    base, grad_n * g_c, standard, scale, 1, active, hidden, parts, ROWS, PARTS, COPIES
                )
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
                gates = paste(a_f, a_g, a_o, nothing, ROWS, UNITS)
            else:
                gates = paste(a_i, a_f, a_g, a_o, ROWS, UNITS)
            fed_back = gates
        elif BASE == "gru" or BASE == "gru_reset_before":
            h_before = tl.where(begin[:, None], h_start, h_before)
            r, z, n, u_n = cut(kept, ROWS, UNITS)
            a_n = total * (1.0 - z) * (1.0 - n * n)
            a_z = total * (h_before - n) * z * (1.0 - z)
            direct = total * z + past
            if BASE == "gru":
                a_r = a_n * u_n * r * (1.0 - r)
                gates = paste(a_r, a_z, a_n, nothing, ROWS, UNITS)
                fed_back = paste(a_r, a_z, a_n * r, nothing, ROWS, UNITS)
                if totals is not None:
                    total_b_n += tl.where(stored, a_n * r, 0.0)
            else:
                u_n = tl.where(stored, a_n, 0.0)
                if gain_hh is not None:
                    scale = tl.load(scales + at * 3 + 2, mask=active, other=0.0)
                    standard = tl.load(
                        saved + ((at * SLOTS + SLOTS - 1) * hidden)[:, None] + units[None, :], mask=stored, other=0.0
                    ).to(tl.float32)
                    total_gain_n += u_n * standard
                    base = sums + (at * PHASES + 1) * parts * 2
                    u_n = standardised_backward(
                        base, u_n * gain_n, standard, scale, 1, active, hidden, parts, ROWS, PARTS, COPIES
                    )
                publish(flow + ((at * GATES + 2) * hidden)[:, None] + units[None, :], u_n, stored, KIND)
                t_0, t_1, t_2, t_3 = arrived_rows(
                    flow_words + (at * GATES + 2) * hidden // WIDTH,
                    hidden // WIDTH,
                    active,
                    PIECES,
                    ROWS,
                    CHUNK_N // WIDTH,
                    CHUNKS_N,
                    HALVES,
                )
                grad_v = product(t_0, t_1, t_2, t_3, n_0, n_1, n_2, n_3, CHUNKS_N, KIND, HALVES, PRECISION)
                through = grad_v * r
                a_r = grad_v * h_before * r * (1.0 - r)
                if dropped is not None:
                    through *= drop
                    a_r *= drop
                direct += through
                gates = paste(a_r, a_z, a_n, nothing, ROWS, UNITS)
                fed_back = gates
        else:
            if BASE == "rnn_relu":
                gates = tl.where(kept > 0, total, 0.0)
            else:
                gates = total * (1.0 - kept * kept)
            fed_back = gates
            direct = past

        is_published = active[:, None] & is_fed[None, :]
        of_place = (at * GATES * hidden)[:, None] + of_gate[None, :]
        if gain_hh is not None:
            scale = tl.load(scales + at * 3, mask=active, other=0.0)
            standard = tl.load(
                saved + ((at * SLOTS + SLOTS - GATES) * hidden)[:, None] + of_gate[None, :],
                mask=is_published,
                other=0.0,
            ).to(tl.float32)
            fed_back = tl.where(is_published, fed_back, 0.0)
            total_gain += fed_back * standard
            PHASE: tl.constexpr = 1 if BASE == "lstm" else 0
            base = sums + (at * PHASES + PHASE) * parts * 2
            fed_back = standardised_backward(
                base, fed_back * gain, standard, scale, FED, active, hidden, parts, ROWS, PARTS, COPIES
            )
        publish(flow + of_place, fed_back, is_published, KIND)
        if inner is not None:
            tl.store(inner + of_place, gates.to(KIND), mask=active[:, None] & is_gate[None, :])
        grad_h = tl.where(active[:, None], direct, grad_h)

    tl.store(grad_h_0 + own, (grad_h_start + grad_h).to(grad_h_0.dtype.element_ty), mask=is_owned)
    if BASE == "lstm":
        tl.store(grad_c_0 + own, (grad_c_start + grad_c).to(grad_c_0.dtype.element_ty), mask=is_owned)
    if totals is not None:
        mine = totals + (way * groups + first_row // ROWS + tl.program_id(1)) * 10 * hidden
        if gain_hh is not None:
            tl.store(mine + of_gate, tl.sum(total_gain, axis=0), mask=is_fed)
            if BASE == "gru_reset_before":
                add_up(mine, 2, hidden, units, is_unit, total_gain_n)
        if gain_c is not None:
            add_up(mine, 4, hidden, units, is_unit, total_gain_c)
            add_up(mine, 5, hidden, units, is_unit, total_shift_c)
        if weight_ch is not None:
            add_up(mine, 6, hidden, units, is_unit, total_p_i)
            add_up(mine, 7, hidden, units, is_unit, total_p_f)
            add_up(mine, 8, hidden, units, is_unit, total_p_o)
        if BASE == "gru":
            add_up(mine, 9, hidden, units, is_unit, total_b_n)
