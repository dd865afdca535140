"""The forward pass: a program owns some rows, some hidden units and one direction, and takes them through all steps.

Places: step t of row b stands at `offsets[t] + b` in all arrays of steps, whether padded or packed. Directions stand side by
side there.
Columns: a program's units times four, the gates of a unit beside each other; of an RNN, its units.

| cell | W_hh h | W_ih x |
|---|---|---|
| RNN | a | a |
| LSTM | i f g o, or f g o | i f g o, or f g o |
| GRU | r z n | r z · n |
| GRU, reset before | r z | r z n |
"""

import triton
import triton.language as tl

from throughtime.kernels.triton.arithmetic import (
    cut,
    load_gates,
    load_weights,
    product,
    sigmoid,
    standardised,
    store_gates,
    tanh,
)
from throughtime.kernels.triton.exchange import arrived_tiles, publish


@triton.jit
def begins_at(t, begins, way, steps, batch, b, length, is_reverse):
    """Return which rows begin anew at a step; it is known a step ahead, since which memory a step waits for depends on it."""
    begin = t == is_reverse * (length - 1)
    if begins is not None:
        is_there = (t >= 0) & (t < length)
        begin |= tl.load(begins + (way * steps + t).to(tl.int64) * batch + b, mask=is_there, other=0) != 0
    return begin


@triton.jit
def forward_loop(
    x,  # W_ih x (rows, D, G, H), or such rows for each token
    ids,  # which of them (places,), or None
    bias,  # (D, 4, H), or (D, 1, H), or None
    weight_words,  # W_hh (D, G, H, H), as integers that are loaded
    weight_ch,  # (D, G − 1, H) or None
    gain_hh,  # (D, G, H) or None
    gain_c,  # (D, H) or None
    shift_c,
    h_0,  # (D, B, H)
    c_0,
    zoneout_h,  # (T, B, H) or None; there is one direction
    zoneout_c,
    dropped,  # recurrent dropout (B, H) or None
    offsets,  # (T,), or None where it is t B
    order,  # which row of the batch each row is (B,), or None
    lengths,  # of the rows in that order, (B,), or None
    begins,  # (D, T, B) or None
    h_in,  # (places · D + D · B, H): h_t as it enters W_hh, unset; then h_0 as it does
    words,  # the same, as integers that are exchanged
    second,  # (places, D, H), unset: r h_in, or None
    second_words,
    sums,  # (places, D, phases, parts, 2), unset, or None
    output,  # (places, D, H), or None where it is h_in
    saved,  # (places, D, S, H) or None
    cells,  # c_t (places, D, H) or None
    scales,  # (places, D, 3) or None
    h_n,  # (D, B, H)
    c_n,
    places,
    first_row,
    batch,
    steps,
    hidden,
    share_h,
    share_c,
    BASE: tl.constexpr,
    COUPLED: tl.constexpr,
    EXPECTED_H: tl.constexpr,  # zoneout's expectation, share_h, stands for a mask
    EXPECTED_C: tl.constexpr,
    WAYS: tl.constexpr,
    REVERSE: tl.constexpr,
    GATES: tl.constexpr,
    SLOTS: tl.constexpr,  # S
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share a row's units, at least
    COPIES: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_N: tl.constexpr,  # of the second product
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    KIND: tl.constexpr,  # dtype of what is multiplied
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take a program's rows and units through all steps."""
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
    # Columns of the product: the gates of a unit beside each other. All else is one tile (ROWS, UNITS) for each gate.
    SIDE: tl.constexpr = 4 if GATES > 1 else 1
    column = tl.arange(0, SIDE * UNITS)
    gate = column % SIDE
    unit = tl.program_id(0) * UNITS + column // SIDE
    FED: tl.constexpr = 2 if BASE == "gru_reset_before" else GATES
    is_fed = (gate < FED) & (unit < hidden)
    WIDTH: tl.constexpr = 2 if HALVES else 1
    width = hidden // WIDTH

    own = (way * batch + b)[:, None] * hidden + units[None, :]
    h_start = tl.load(h_0 + own, mask=is_owned, other=0.0).to(tl.float32)
    h = h_start
    c_start = h_start
    if BASE == "lstm":
        c_start = tl.load(c_0 + own, mask=is_owned, other=0.0).to(tl.float32)
    c = c_start
    if dropped is not None:
        drop = tl.load(dropped + b[:, None] * hidden + units[None, :], mask=is_owned, other=0.0).to(tl.float32)

    own_weight = weight_words + way * GATES * hidden * width
    rows_fed = own_weight + (gate * hidden + unit) * width
    weights = load_weights(rows_fed, is_fed, width, KIND, HALVES, PIECES, CHUNK, CHUNKS)
    if BASE == "gru_reset_before":
        rows_n = own_weight + (2 * hidden + units) * width
        weights_n = load_weights(rows_n, is_unit, width, KIND, HALVES, PIECES_N, CHUNK, CHUNKS)

    of_units = units[None, :]
    is_loaded = is_unit[None, :]
    if bias is not None:
        biases = load_gates(bias + way * SIDE * hidden + of_units, SIDE, hidden, is_loaded)
    if gain_hh is not None:
        gains = load_gates(gain_hh + way * GATES * hidden + of_units, GATES, hidden, is_loaded)
    if gain_c is not None:
        g_c = tl.load(gain_c + way * hidden + units, mask=is_unit, other=0.0)[None, :]
        s_c = tl.load(shift_c + way * hidden + units, mask=is_unit, other=0.0)[None, :]
    if weight_ch is not None:
        peep = weight_ch + way * (GATES - 1) * hidden + units
        p_f = tl.load(peep + (GATES - 3) * hidden, mask=is_unit, other=0.0)[None, :]
        p_o = tl.load(peep + (GATES - 2) * hidden, mask=is_unit, other=0.0)[None, :]
        if not COUPLED:
            p_i = tl.load(peep, mask=is_unit, other=0.0)[None, :]
    PHASES: tl.constexpr = 2 if BASE == "lstm" or BASE == "gru_reset_before" else 1

    begin = begins_at(is_reverse * (last - 1), begins, way, steps, batch, b, length, is_reverse)
    before = b.to(tl.int64)
    for step in range(last):
        t = is_reverse * (last - 1) + step * ahead
        active = t < length
        if offsets is not None:
            place = tl.load(offsets + t) + b
        else:
            place = t.to(tl.int64) * batch + b
        at = place * WAYS + way
        stored = active[:, None] & is_unit[None, :]

        # What doesn't depend on the step before is asked for before that is waited for.
        source = place
        if ids is not None:
            source = tl.load(ids + place, mask=active, other=0)
        of_input = x + ((source * WAYS + way) * GATES * hidden)[:, None] + of_units
        x_0, x_1, x_2, x_3 = load_gates(of_input, GATES, hidden, stored)
        keeps_at = (t.to(tl.int64) * batch + b)[:, None] * hidden + of_units
        if zoneout_h is not None:
            keeps_h = tl.load(zoneout_h + keeps_at, mask=stored, other=0) != 0
        if zoneout_c is not None:
            keeps_c = tl.load(zoneout_c + keeps_at, mask=stored, other=0) != 0
        h_before = tl.where(begin[:, None], h_start, h)
        c_before = tl.where(begin[:, None], c_start, c)

        source_row = tl.where(begin, places * WAYS + way * batch + b, before * WAYS + way)
        tiles = arrived_tiles(words + source_row * width, width, active, PIECES, CHUNK, CHUNKS, HALVES)
        u = product(tiles, weights, KIND, HALVES, PRECISION)
        if gain_hh is not None:
            is_in = is_row[:, None] & is_fed[None, :]
            base = sums + at * PHASES * parts * 2
            u, mean, scale = standardised(base, u, is_in, FED, active, hidden, parts, ROWS, UNITS, PARTS, COPIES)
            if saved is not None:
                tl.store(scales + at * 3, scale, mask=active)
        if GATES > 1:
            u_0, u_1, u_2, u_3 = cut(u, ROWS, UNITS)
        else:
            u_0 = u
            u_1 = u
            u_2 = u
            u_3 = u
        if gain_hh is not None:
            if saved is not None:
                of_standard = saved + ((at * SLOTS + SLOTS - GATES) * hidden)[:, None] + of_units
                store_gates(of_standard, (u_0, u_1, u_2, u_3), FED, hidden, stored)
            u_0 *= gains[0]
            u_1 *= gains[1]
            u_2 *= gains[2]
            u_3 *= gains[3]
        if bias is not None:
            u_0 += biases[0]
            if GATES > 1:
                u_1 += biases[1]
                u_2 += biases[2]
                u_3 += biases[3]

        if BASE == "lstm":
            if COUPLED:
                a_f = x_0 + u_0
                a_g = x_1 + u_1
                a_o = x_2 + u_2
            else:
                a_i = x_0 + u_0
                a_f = x_1 + u_1
                a_g = x_2 + u_2
                a_o = x_3 + u_3
            if weight_ch is not None:
                a_f += p_f * c_before
            f = sigmoid(a_f)
            g = tanh(a_g)
            if COUPLED:
                i = 1.0 - f
            else:
                if weight_ch is not None:
                    a_i += p_i * c_before
                i = sigmoid(a_i)
            if gain_c is not None:
                # The backward pass standardises the c that it makes of what was stored, so that is the one to be standardised.
                f = f.to(KIND).to(tl.float32)
                i = 1.0 - f if COUPLED else i.to(KIND).to(tl.float32)
                g = g.to(KIND).to(tl.float32)
                c_before = c_before.to(KIND).to(tl.float32)
            c_new = f * c_before + i * g
            if weight_ch is not None:
                a_o += p_o * c_new
            o = sigmoid(a_o)
            n = c_new
            if gain_c is not None:
                base = sums + (at * PHASES + 1) * parts * 2
                n, mean, scale = standardised(
                    base, c_new, is_owned, 1, active, hidden, parts, ROWS, UNITS, PARTS, COPIES
                )
                if saved is not None:
                    tl.store(scales + at * 3 + 1, mean, mask=active)
                    tl.store(scales + at * 3 + 2, scale, mask=active)
                n = n * g_c + s_c
            h_new = o * tanh(n)
            if EXPECTED_C:
                c_new = share_c * c_before + (1.0 - share_c) * c_new
            elif zoneout_c is not None:
                c_new = tl.where(keeps_c, c_before, c_new)
            c = tl.where(active[:, None], c_new, c)
            if COUPLED:
                k_0, k_1, k_2, k_3 = f, g, o, o
            else:
                k_0, k_1, k_2, k_3 = i, f, g, o
        elif BASE == "gru":
            # The last bias is that of what the input gives to n.
            r = sigmoid(x_0 + u_0)
            z = sigmoid(x_1 + u_1)
            u_n = u_2
            n = tanh(x_2 + u_3 + r * u_n)
            h_new = (1.0 - z) * n + z * h_before
            k_0, k_1, k_2, k_3 = r, z, n, u_n
        elif BASE == "gru_reset_before":
            r = sigmoid(x_0 + u_0)
            z = sigmoid(x_1 + u_1)
            x_n = x_2 + u_2
            v = r * h_before
            if dropped is not None:
                v *= drop
            publish(second + (at * hidden)[:, None] + units[None, :], v, stored, KIND)
            tiles = arrived_tiles(second_words + at * width, width, active, PIECES_N, CHUNK, CHUNKS, HALVES)
            u_n = product(tiles, weights_n, KIND, HALVES, PRECISION)
            if gain_hh is not None:
                base = sums + (at * PHASES + 1) * parts * 2
                u_n, mean, scale = standardised(
                    base, u_n, is_owned, 1, active, hidden, parts, ROWS, UNITS, PARTS, COPIES
                )
                if saved is not None:
                    tl.store(scales + at * 3 + 2, scale, mask=active)
                    tl.store(
                        saved + ((at * SLOTS + SLOTS - 1) * hidden)[:, None] + units[None, :],
                        u_n.to(saved.dtype.element_ty),
                        mask=stored,
                    )
                u_n *= gains[2]
            n = tanh(x_n + u_n)
            h_new = (1.0 - z) * n + z * h_before
            k_0, k_1, k_2, k_3 = r, z, n, n
        else:
            a = x_0 + u_0
            if BASE == "rnn_relu":
                h_new = tl.where(a < 0, 0.0, a)
            else:
                h_new = tanh(a)
            k_0, k_1, k_2, k_3 = h_new, h_new, h_new, h_new

        if EXPECTED_H:
            h_new = share_h * h_before + (1.0 - share_h) * h_new
        elif zoneout_h is not None:
            h_new = tl.where(keeps_h, h_before, h_new)
        h = tl.where(active[:, None], h_new, h)
        own_place = (at * hidden)[:, None] + units[None, :]
        if dropped is not None:
            publish(h_in + own_place, h * drop, stored, KIND)
            tl.store(output + own_place, h.to(output.dtype.element_ty), mask=stored)
        else:
            publish(h_in + own_place, h, stored, KIND)

        # What only the backward pass reads is stored when the others have what they wait for.
        if saved is not None:
            SAVED: tl.constexpr = 4 if BASE == "gru" else GATES
            store_gates(saved + (at * SLOTS * hidden)[:, None] + of_units, (k_0, k_1, k_2, k_3), SAVED, hidden, stored)
            if BASE == "lstm":
                tl.store(cells + own_place, c.to(cells.dtype.element_ty), mask=stored)
        begin = begins_at(t + ahead, begins, way, steps, batch, b, length, is_reverse)
        before = place

    tl.store(h_n + own, h.to(h_n.dtype.element_ty), mask=is_owned)
    if BASE == "lstm":
        tl.store(c_n + own, c.to(c_n.dtype.element_ty), mask=is_owned)
