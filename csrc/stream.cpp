// A step of a model for some of its streams. Compiled once for each instruction set.
#include "stream.h"

#include <cstring>

#include "cells.h"
#include "norm.h"
#include "quantised.h"

namespace throughtime::THROUGHTIME_ISA {
namespace {

constexpr long W = lanes<float>;
constexpr long panel = 4 * W;  // columns
using V = Vector<float>;

constexpr long up_to(long multiple, long count) { return (count + multiple - 1) / multiple * multiple; }

// Rows of scratch begin at whole lines, and whole vectors may be read and written at their ends.
constexpr long padded(long width) { return up_to(16, width) + W; }

// Packing ------------------------------------------------------------------------------------------------------------

long packed_bytes(Precision precision, long columns, long depth) {
  switch (precision) {
    case Precision::bfloat16: return packed_size<Bf16>(plain_panels(columns), depth) * sizeof(Bf16);
    case Precision::int8: return packed_quantised_bytes(columns, depth);
    default: return packed_size<float>(plain_panels(columns), depth) * sizeof(float);
  }
}

template <class E>
void pack_all(long columns, long depth, const float* source, void* packed) {
  const PanelShape shape = plain_panels(columns);
  pack_panels<E>(shape, depth, source, depth, 1, 0, panel_count<E>(shape), static_cast<E*>(packed));
}

void pack(Precision precision, long columns, long depth, const float* source, void* packed, float* scale,
          int32_t* offset) {
  switch (precision) {
    case Precision::bfloat16: return pack_all<Bf16>(columns, depth, source, packed);
    case Precision::int8: return pack_quantised(columns, depth, source, static_cast<int8_t*>(packed), scale, offset);
    default: return pack_all<float>(columns, depth, source, packed);
  }
}

// Products -----------------------------------------------------------------------------------------------------------

// One row times vectors of columns, of a panel or of whole ones side by side: as `multiply` sums, with enough sums at once to hide
// each other's latency.
template <class E, int vectors>
THROUGHTIME_INLINE void multiply_row(long depth, const E* a, const E* packed, long panel_size, const float* start,
                                     float* tile) {
  constexpr int wide = vectors < 4 ? vectors : 4;
  constexpr long step = depth_step<E>, most = block_depth<E>;
  for (long begin = 0; begin < depth; begin += most) {
    const long end = depth - begin < most ? depth : begin + most;
    V sum[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[v] = begin || !start ? V{} : load(start + v * W);
    const auto add = [&](long k, long elements) __attribute__((always_inline)) {
      const auto x = splat_operand(a + k, elements);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        add_product<E>(sum[v], x, load_operand(packed + v / wide * panel_size + (k * wide + v % wide * step) * W));
    };
    long k = begin;
    for (; k + step <= end; k += step) add(k, step);
    if (k < end) add(k, 1);  // of pairs, where the depth is odd
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store(tile + v * W, begin ? load(tile + v * W) + sum[v] : sum[v]);
  }
}

// The same for as many vectors of one panel as are `there`.
template <class E, int vectors>
void multiply_row_by_panel(int there, long depth, const E* a, const E* packed, const float* start, float* tile) {
  if constexpr (vectors > 1)
    if (there < vectors) return multiply_row_by_panel<E, vectors - 1>(there, depth, a, packed, start, tile);
  multiply_row<E, vectors>(depth, a, packed, 0, start, tile);
}

// Columns of a tile to where they belong, which may have no room for whole panels.
THROUGHTIME_INLINE void put(float* to, const float* tile, long columns) {
  if (columns >= panel) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(to + v * W, load(tile + v * W));
    return;
  }
  for (long j = 0; j < columns; j += W) store(to + j, load(tile + j), columns - j);
}

// out (rows, columns) = start + a (rows, depth) . W^T.
template <class E>
void multiply_by(const Matrix& w, const float* start, long rows, Rows<const E> a, Rows<float> out) {
  const PanelShape shape = plain_panels(w.columns);
  const long size = panel_size<E>(shape, w.depth), count = panel_count<E>(shape);
  const auto vectors = [&](long p) { return panel_vectors<E>(shape, p); };
  const E* packed = static_cast<const E*>(w.packed);
  alignas(64) float tile[most_positions * panel];
  alignas(64) const float zero[panel] = {};
  if (rows == 1) {
    constexpr int at_once = 2;
    const auto begin = [&](long p) { return start ? start + p * panel : nullptr; };
    long p = 0;
    for (; p + at_once <= w.columns / panel; p += at_once) {
      multiply_row<E, 4 * at_once>(w.depth, a.data, packed + p * size, size, begin(p), tile);
      for (long i = p; i < p + at_once; ++i) put(out.data + i * panel, tile + (i - p) * panel, panel);
    }
    for (; p < count; ++p) {
      multiply_row_by_panel<E, 4>(vectors(p), w.depth, a.data, packed + p * size, begin(p), tile);
      put(out.data + p * panel, tile, w.columns - p * panel);
    }
    return;
  }
  for (long p = 0; p < count; ++p) {
    multiply<E, 4>(vectors(p), rows, w.depth, a.data, a.stride, packed + p * size, start ? start + p * panel : zero, tile,
                   panel);
    for (long row = 0; row < rows; ++row) put(out.at(row) + p * panel, tile + row * panel, w.columns - p * panel);
  }
}

// Rows as the product takes them.
Rows<const Bf16> rounded(long rows, long depth, Rows<const float> a, Bf16* to) {
  const long stride = padded(depth);
  for (long row = 0; row < rows; ++row)
    for (long k = 0; k < depth; k += W) store(to + row * stride + k, load(a.at(row) + k, depth - k));
  return {to, stride};
}

// Some rows of int8 by one panel after the other, back in float32: start + (scale of the row * scale of the column) * sum.
template <int rows, int panels>
void multiply_quantised_panels(const Matrix& w, long first, const float* start, const int8_t* a, long a_stride,
                               const float* steps, Rows<float> out) {
  const long size = quantised_panel(w.depth);
  alignas(64) int32_t sums[rows * panels * panel];
  alignas(64) float tile[panel];
  sum_fours<rows, panels>(w.depth, a, a_stride, static_cast<const int8_t*>(w.packed) + first * size, size, sums);
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p) {
      const long column = (first + p) * panel;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const long j = column + v * W;
        Words sum, offset;  // modulo 2^32: their difference fits, they may not
        __builtin_memcpy(&sum, sums + (r * panels + p) * panel + v * W, sizeof sum);
        __builtin_memcpy(&offset, w.offset + j, sizeof offset);
        V value = (steps[r] * load(w.scale + j)) * __builtin_convertvector((Integers)(sum - offset), V);
        hold(value);  // rounded before `start` is added, however many rows there are: else it is fused in some of these functions
        store(tile + v * W, start ? load(start + j) + value : value);
      }
      put(out.at(r) + column, tile, w.columns - column);
    }
}

template <int rows>
void multiply_quantised_rows(long count, const Matrix& w, long first, const float* start, const int8_t* a,
                             long a_stride, const float* steps, Rows<float> out) {
  if constexpr (rows > 0) {
    if (count == rows) return multiply_quantised_panels<rows, 1>(w, first, start, a, a_stride, steps, out);
    multiply_quantised_rows<rows - 1>(count, w, first, start, a, a_stride, steps, out);
  }
}

constexpr long quantised_stride(long depth) { return up_to(64, depth) + 64; }
constexpr long quantised_bytes(long rows, long depth) { return rows * (quantised_stride(depth) + sizeof(float)); }

void multiply_quantised(const Matrix& w, const float* start, long rows, Rows<const float> a, Rows<float> out, char* narrow) {
  const long stride = quantised_stride(w.depth), count = panel_count<float>(plain_panels(w.columns));
  int8_t* const q = reinterpret_cast<int8_t*>(narrow);
  float steps[most_positions];
  for (long row = 0; row < rows; ++row) steps[row] = quantise(a.at(row), w.depth, q + row * stride).step;
  if (rows == 1) {
    long p = 0;
    for (; p + 2 <= count; p += 2) multiply_quantised_panels<1, 2>(w, p, start, q, stride, steps, out);
    if (p < count) multiply_quantised_panels<1, 1>(w, p, start, q, stride, steps, out);
    return;
  }
  constexpr int height = tile_rows<4>;
  const long tiles = (rows + height - 1) / height;
  for (long p = 0; p < count; ++p)
    for (long i = 0; i < tiles; ++i) {
      const long row = i * rows / tiles;
      multiply_quantised_rows<height>((i + 1) * rows / tiles - row, w, p, start, q + row * stride, stride, steps + row,
                                      {out.at(row), out.stride});
    }
}

// Memory of a step ---------------------------------------------------------------------------------------------------------

long larger(long a, long b) { return a < b ? b : a; }

struct StepMemory {
  Rows<float> x, u, m, state, passed[2];
  char* narrow;

  StepMemory(const StreamModel& model, char* memory) : memory_(memory) {
    long gates = 0, hidden = 0, width = 0, depth = 0;
    for (int i = 0; i < model.count; ++i) {
      const Stage& s = model.stages[i];
      width = larger(larger(width, s.input), s.width());
      depth = larger(larger(depth, s.input), s.width());
      if (!s.is_recurrent()) continue;
      gates = larger(gates, s.gates() * s.hidden);
      hidden = larger(hidden, s.hidden);
    }
    depth = larger(depth, hidden);
    x = rows(gates + panel);
    u = rows(gates + panel);
    m = rows(hidden);
    state = rows(model.state_stride);
    for (Rows<float>& row : passed) row = rows(width + panel);
    narrow = take(model.precision == Precision::bfloat16 ? most_positions * padded(depth) * sizeof(Bf16)
                  : model.precision == Precision::int8   ? quantised_bytes(most_positions, depth)
                                                         : 0);
  }

  long bytes() const { return bytes_; }

 private:
  Rows<float> rows(long width) {
    const long stride = padded(width);
    return {reinterpret_cast<float*>(take(most_positions * stride * sizeof(float))), stride};
  }
  char* take(long bytes) {
    char* const here = memory_ + bytes_;
    bytes_ += up_to(64, bytes);
    return here;
  }

  char* memory_;
  long bytes_ = 0;
};

long scratch_bytes(const StreamModel& model) { return StepMemory(model, nullptr).bytes(); }

// Cells --------------------------------------------------------------------------------------------------------------

// One step of a stream: the products are made, x = W_ih x and u = W_hh h. Whole vectors are read and written, whose last lanes may
// be nobody's. Sums are in the order in which the layers take them (csrc/cells).
struct StreamCell {
  const Stage& s;
  const float* x;
  float *u, *h, *c, *m, *out;

  void step() const {
    switch (s.kind) {
      case StageKind::lstm: return s.is_variant ? step_lstm_variant() : step_lstm();
      case StageKind::gru: return s.is_variant ? step_gru_variant() : step_gru();
      case StageKind::gru_reset_before:
      case StageKind::mgu: return s.is_variant ? step_gates_variant() : step_gates();
      default: return s.is_variant ? step_rnn_variant() : step_rnn();
    }
  }

  // The second half of a cell whose last gate meets what another makes of h: its product follows the gates in `u`.
  void step_candidate() const {
    const long H = s.hidden, last = s.joint() * H;
    const float* const gate = u + last - H;  // z, or f
    const auto mix = [&](long j, V n) {
      const V h_prev = load(h + j), share = load(gate + j);
      put_h(j, s.kind == StageKind::mgu ? Mgu<float>::mix(share, n, h_prev) : Gru<float>::mix(share, n, h_prev));
    };
    if (s.is_variant) {
      const Norm<float> of_x = norm_of_row(x, last + H), of_n = norm_of_row(u + last, H);
      return each([&](long j) { mix(j, tanh<float>(in(of_x, last + j) + back(of_n, last + j))); });
    }
    each([&](long j) { mix(j, tanh<float>(load(u + last + j) + load(x + last + j))); });
  }

  // h = W_hr m, which is in `u`.
  void step_projected() const {
    for (long j = 0; j < s.projected; j += W) put_h(j, load(u + j));
  }

 private:
  template <class Do>
  THROUGHTIME_INLINE void each(Do unit) const {
    for (long j = 0; j < s.hidden; j += W) unit(j);
  }

  THROUGHTIME_INLINE V a(long j) const { return load(u + j) + (load(x + j) + load(s.bias_ih + j)); }

  THROUGHTIME_INLINE void put_h(long j, V to) const {
    if (s.kept_h != 0.0f) to = blend(splat(s.kept_h), load(h + j), to);
    store(h + j, to);
    store(out + j, to);
  }

  THROUGHTIME_INLINE void put_m(long j, V to) const {
    if (s.projected)
      store(m + j, to);
    else
      put_h(j, to);
  }

  bool is_relu() const { return s.kind == StageKind::rnn_relu; }

  void step_rnn() const {
    each([&](long j) { put_h(j, Rnn<float>::step(a(j), is_relu())); });
  }

  void step_lstm() const {
    const long H = s.hidden;
    each([&](long j) {
      const auto it = Lstm<float>::step(a(j), a(H + j), a(2 * H + j), a(3 * H + j), load(c + j));
      store(c + j, it.c);
      put_m(j, it.m);
    });
  }

  void step_gru() const {
    const long H = s.hidden;
    each([&](long j) {
      const V r = sigmoid<float>(a(j)), z = sigmoid<float>(a(H + j));
      const V n = tanh<float>(load(x + 2 * H + j) + load(s.bias_ih + 2 * H + j) + r * load(u + 2 * H + j));
      put_h(j, Gru<float>::mix(z, n, load(h + j)));
    });
  }

  // What of h the last gate meets: r * h, its z in `u`; or f * h, its f there.
  void step_gates() const {
    const long H = s.hidden;
    each([&](long j) {
      V gate = sigmoid<float>(a(j));
      const V met = gate * load(h + j);
      if (s.joint() == 2) gate = sigmoid<float>(a(H + j));
      store(u + (s.joint() - 1) * H + j, gate);
      store(m + j, met);
    });
  }

  // With variants: normalised or not, x and u each get their bias, and then meet.
  Norm<float> norm_of_row(const float* row, long count) const {
    return s.gain_hh ? norm_of<float>(row, count) : Norm<float>{0.0f, 1.0f};
  }
  THROUGHTIME_INLINE V in(Norm<float> norm, long j) const {
    const V w = load(x + j), b = load(s.bias_ih + j);
    return s.gain_ih ? normalised<float>(w, norm, load(s.gain_ih + j), b) : w + b;
  }
  THROUGHTIME_INLINE V back(Norm<float> norm, long j) const {
    const V w = load(u + j), b = s.bias_hh ? load(s.bias_hh + j) : V{};
    return s.gain_hh ? normalised<float>(w, norm, load(s.gain_hh + j), b) : w + b;
  }

  void step_rnn_variant() const {
    const Norm<float> of_x = norm_of_row(x, s.hidden), of_u = norm_of_row(u, s.hidden);
    each([&](long j) { put_h(j, Rnn<float>::step(in(of_x, j) + back(of_u, j), is_relu())); });
  }

  void step_lstm_variant() const {
    const long H = s.hidden, f_row = s.is_coupled ? 0 : 1;
    const Norm<float> of_x = norm_of_row(x, s.gates() * H), of_u = norm_of_row(u, s.gates() * H);
    float* const o_row = u + (f_row + 2) * H;
    each([&](long j) {
      const auto a = [&](long g) { return in(of_x, g * H + j) + back(of_u, g * H + j); };
      const auto peephole = [&](long g, V c) { return s.weight_ch ? load(s.weight_ch + g * H + j) * c : V{}; };
      const V c_prev = load(c + j);
      const V f = sigmoid<float>(a(f_row) + peephole(f_row, c_prev)), g = tanh<float>(a(f_row + 1));
      const V i = s.is_coupled ? 1.0f - f : sigmoid<float>(a(0) + peephole(0, c_prev));
      const V new_c = Lstm<float>::next_c(f, c_prev, i, g);
      const V o = sigmoid<float>(a(f_row + 2) + peephole(f_row + 1, new_c));
      store(c + j, s.kept_c != 0.0f ? blend(splat(s.kept_c), c_prev, new_c) : new_c);
      if (!s.gain_c) return put_m(j, o * tanh<float>(new_c));
      store(o_row + j, o);
      store(m + j, new_c);
    });
    if (!s.gain_c) return;
    const Norm<float> of_c = norm_of<float>(m, H);
    each([&](long j) {
      const V normal = normalised<float>(load(m + j), of_c, load(s.gain_c + j), load(s.shift_c + j));
      put_m(j, load(o_row + j) * tanh<float>(normal));
    });
  }

  void step_gru_variant() const {
    const long H = s.hidden;
    const Norm<float> of_x = norm_of_row(x, 3 * H), of_u = norm_of_row(u, 3 * H);
    each([&](long j) {
      const V r = sigmoid<float>(in(of_x, j) + back(of_u, j)), z = sigmoid<float>(in(of_x, H + j) + back(of_u, H + j));
      const V n = tanh<float>(in(of_x, 2 * H + j) + r * back(of_u, 2 * H + j));
      put_h(j, Gru<float>::mix(z, n, load(h + j)));
    });
  }

  void step_gates_variant() const {
    const long H = s.hidden;
    const Norm<float> of_x = norm_of_row(x, s.gates() * H), of_u = norm_of_row(u, s.joint() * H);
    each([&](long j) {
      V gate = sigmoid<float>(in(of_x, j) + back(of_u, j));
      const V met = gate * load(h + j);
      if (s.joint() == 2) gate = sigmoid<float>(in(of_x, H + j) + back(of_u, H + j));
      store(u + (s.joint() - 1) * H + j, gate);
      store(m + j, met);
    });
  }
};

// Stages -------------------------------------------------------------------------------------------------------------

class Stepper {
 public:
  Stepper(const StreamModel& model, char* scratch) : model_(model), scratch_(model, scratch) {}

  void run(const StreamCall& call, long first, long count) {
    Rows<float> states{call.states + first * model_.state_stride, model_.state_stride};
    if (call.which) states = scratch_.state;
    if (call.which)
      for (long row = 0; row < count; ++row) copy(states.at(row), own_state(call, first + row), model_.state_stride);
    // The rows of several steps follow each other only where no other rows stand between them.
    const long at_once = count == call.rows ? larger(1, most_positions / count) : 1;
    for (long t = 0; t < call.steps; t += at_once) {
      const long steps = call.steps - t < at_once ? call.steps - t : at_once;
      pass(call, t, steps, t * call.rows + first, first, count, states);
    }
    if (call.which)
      for (long row = 0; row < count; ++row) copy(own_state(call, first + row), states.at(row), model_.state_stride);
  }

  void product(const Matrix& w, const float* start, long rows, Rows<const float> a, Rows<float> out) {
    switch (model_.precision) {
      case Precision::bfloat16:
        return multiply_by<Bf16>(w, start, rows, rounded(rows, w.depth, a, reinterpret_cast<Bf16*>(scratch_.narrow)), out);
      case Precision::int8:
        return multiply_quantised(w, start, rows, a, out, scratch_.narrow);
      default: return multiply_by<float>(w, start, rows, a, out);
    }
  }

 private:
  static void copy(float* to, const float* from, long count) { memcpy(to, from, count * sizeof(float)); }
  float* own_state(const StreamCall& call, long row) const { return call.states + call.which[row] * model_.state_stride; }

  // Some steps of some rows, which are positions that follow each other from `place` on, through all stages.
  void pass(const StreamCall& call, long t, long steps, long place, long first, long count, Rows<float> states) {
    const long all = steps * count;
    const int64_t* const ids = call.ids ? call.ids + place : nullptr;
    Rows<const float> in = read(call, ids, place, all);
    float* out = call.out + place * model_.output();
    long positions = all;
    for (int i = 0; i <= model_.count; ++i) {
      if (i == model_.readout && call.last_only) {
        if (t + steps < call.steps) return;
        in.data += (steps - 1) * count * in.stride;
        positions = count;
        out = call.out + first * model_.output();
      }
      if (i == model_.count) break;
      const Stage& s = model_.stages[i];
      const bool is_last = i + 1 == model_.count && !s.is_recurrent();
      const Rows<float> to = is_last ? Rows<float>{out, model_.output()} : scratch_.passed[i % 2];
      if (s.is_recurrent())
        recurrent(s, steps, count, i == 0 && model_.table_is_product ? ids : nullptr, in, states, to);
      else
        product(s.weight_ih, s.bias_ih, positions, in, to);
      in = {to.data, to.stride};
    }
    if (model_.readout == model_.count)
      for (long i = 0; i < positions; ++i) copy(out + i * model_.output(), in.at(i), model_.output());
  }

  // What the first stage reads; nothing where ids choose what its product would be.
  Rows<const float> read(const StreamCall& call, const int64_t* ids, long place, long positions) {
    if (!ids) return {call.x + place * model_.input(), model_.input()};
    const Rows<float> to = scratch_.passed[1];
    for (long i = 0; i < positions && !model_.table_is_product; ++i)
      copy(to.at(i), model_.table + ids[i] * model_.table_stride, model_.input());
    return {to.data, to.stride};
  }

  void recurrent(const Stage& s, long steps, long rows, const int64_t* ids, Rows<const float> in, Rows<float> states,
                 Rows<float> out) {
    if (!ids) product(s.weight_ih, nullptr, steps * rows, in, scratch_.x);
    const Rows<float> h{states.data + s.h_at, states.stride}, u = scratch_.u, m = scratch_.m;
    for (long t = 0; t < steps; ++t) {
      product(s.weight_hh, s.is_variant ? nullptr : s.bias_hh, rows, {h.data, h.stride}, u);
      const Rows<float> own_out{out.at(t * rows), out.stride};
      const auto cell = [&](long row) -> StreamCell {
        const long place = t * rows + row;
        const float* x = ids ? model_.table + ids[place] * model_.table_stride : scratch_.x.at(place);
        return {s, x, u.at(row), h.at(row), states.at(row) + s.c_at, m.at(row), own_out.at(row)};
      };
      for (long row = 0; row < rows; ++row) cell(row).step();
      if (s.has_last()) {
        const Rows<float> to{u.data + s.joint() * s.hidden, u.stride};
        product(s.weight_n, s.is_variant ? nullptr : s.bias_n, rows, {m.data, m.stride}, to);
        for (long row = 0; row < rows; ++row) cell(row).step_candidate();
      }
      if (s.projected) {
        product(s.weight_hr, nullptr, rows, {m.data, m.stride}, u);
        for (long row = 0; row < rows; ++row) cell(row).step_projected();
      }
    }
  }

  const StreamModel& model_;
  const StepMemory scratch_;
};

void multiply(const StreamModel& model, const Matrix& w, const float* start, long rows, const float* x, float* out,
              long stride, char* scratch) {
  Stepper stepper(model, scratch);
  for (long first = 0; first < rows; first += most_positions)
    stepper.product(w, start, rows - first < most_positions ? rows - first : most_positions,
                    {x + first * w.depth, w.depth}, {out + first * stride, stride});
}

void step(const StreamModel& model, const StreamCall& call, long first, long count, char* scratch) {
  Stepper(model, scratch).run(call, first, count);
}

}  // namespace

extern const StreamKernels stream_kernels;
const StreamKernels stream_kernels{packed_bytes, pack, multiply, scratch_bytes, step};

}  // namespace throughtime::THROUGHTIME_ISA
