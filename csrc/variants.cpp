// The time loop of cells with variants: layer normalisation, peepholes, coupled gates, zoneout, recurrent dropout. The
// equations stand in src/throughtime/cells, with the same letters. Compiled once for each instruction set.
//
// A step is cut in phases over a group's rows, between which the members of a group meet: the product with W_hh, whose
// whole row a normalisation needs before any unit can go on; the gates; with an LSTM's c normalised, that. Each member
// takes the statistics of a whole row itself rather than joining parts of them: the bits are then the same whatever the
// number of threads, and nobody has to meet for it.
#include "variants.h"

#include "cells.h"
#include "member.h"

namespace throughtime::THROUGHTIME_ISA {
namespace {

// Mean and 1 / sqrt(variance + epsilon) of a row.
template <class T>
struct Norm {
  using V = Vector<T>;
  T mean, scale;

  V standard(V u) const { return (u - mean) * scale; }
};

THROUGHTIME_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
THROUGHTIME_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class T>
T sum_of_lanes(Vector<T> v) {
  T lane[lanes<T>];
  store(lane, v);
  for (long width = lanes<T> / 2; width > 0; width /= 2)
    for (long l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

// term(j, n): the terms at j and after, `n` of which count. Lanes past the end must be zero.
template <class T, class Term>
THROUGHTIME_INLINE T sum_over(long count, Term term) {
  constexpr long W = lanes<T>;
  Vector<T> sum[4] = {};
  long j = 0;
  for (; j + 4 * W <= count; j += 4 * W)
    for (long v = 0; v < 4; ++v) sum[v] += term(j + v * W, W);
  for (; j < count; j += W) sum[0] += term(j, count - j);
  return sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
Vector<T> only(Vector<T> v, long count) {
  if (count >= lanes<T>) return v;
  T lane[lanes<T>] = {};
  store(lane, v, count);
  return load(lane);
}

template <class T>
Norm<T> norm_of(const T* row, long count) {
  constexpr T epsilon = T(1e-5);
  const T mean = sum_over<T>(count, [&](long j, long n) { return load(row + j, n); }) / T(count);
  const T variance = sum_over<T>(count, [&](long j, long n) {
    const Vector<T> off = only<T>(load(row + j, n) - mean, n);
    return off * off;
  }) / T(count);
  return {mean, T(1) / square_root(variance + epsilon)};
}

// What a normalisation's backward needs of a row: the means of the standardised row's gradient, and of its product with it.
template <class T>
struct Moments {
  T plain, with_standard;
};

template <class T>
Moments<T> moments_of(const T* grad, const T* gain, const T* row, Norm<T> norm, long count) {
  const auto grad_standard = [&](long j, long n) { return load(grad + j, n) * load(gain + j, n); };
  return {sum_over<T>(count, grad_standard) / T(count),
          sum_over<T>(count, [&](long j, long n) { return grad_standard(j, n) * norm.standard(load(row + j, n)); }) /
              T(count)};
}

template <class T>
THROUGHTIME_INLINE Vector<T> normalise_backward(Vector<T> grad, Vector<T> gain, Vector<T> standard, Norm<T> norm,
                                                Moments<T> m) {
  Vector<T> grad_standard = grad * gain;
  hold(grad_standard);  // rounded, as its mean is: a single unit's gradient is their difference, and exactly zero
  return (grad_standard - m.plain - standard * m.with_standard) * norm.scale;
}

// An LSTM's c_t, which with zoneout both passes compute: fused alike in both, or the backward pass would meet another c than the
// forward pass has normalised. Of a single unit c − mean is exactly zero, and what isn't grows by 1/√ε.
template <class V>
THROUGHTIME_INLINE V next_c(V f, V c_prev, V i, V g) {
  V added = i * g;
  hold(added);
  return f * c_prev + added;
}

// What both passes have in common.
template <class T>
class VariantMember : public Member<T> {
 protected:
  using Base = Member<T>;
  using V = Vector<T>;
  static constexpr long W = lanes<T>;

  VariantMember(const Variant<T>& s, Plan plan, long member, Barrier* barrier)
      : Base(s, plan, member, barrier), s_(s), own_(Base::units(plain_panels(s.hidden))),
        own_h_(Base::units(plain_panels(s.width()))), GH_(s.gates_count() * s.hidden) {}

  bool is_normalised() const { return s_.gain_hh; }
  long row_of(long t, long row) const { return Base::packed_row(t, row) - s_.first_row; }
  T* gates(long t, long row) const { return s_.gates + row_of(t, row) * GH_; }
  T* kept(long t, long row) const { return s_.kept + row_of(t, row) * s_.hidden; }

  // One of the three norms of a step.
  Norm<T> norm(long t, long row, int which) const {
    const T* it = s_.norms + row_of(t, row) * s_.norms_width() + 2 * which;
    return {it[0], it[1]};
  }

  static V optional(const T* vector, long j, long n) { return vector ? load(vector + j, n) : V{}; }

  V mask(const uint8_t* zoneout, T share, long t, long row, long width, long unit) const {
    if (!zoneout) return splat(share);
    const uint8_t* from = zoneout + Base::padded_row(t, row) * width + unit;
    T lane[W] = {};
    for (long l = 0, n = width - unit; l < W && l < n; ++l) lane[l] = T(from[l] != 0);
    return load(lane);
  }
  bool zones_h() const { return s_.zoneout_h || s_.kept_h != T(0); }
  bool zones_c() const { return s_.zoneout_c || s_.kept_c != T(0); }
  V mask_h(long t, long row, long unit) const {
    return mask(s_.zoneout_h, s_.kept_h, t, row, s_.width(), unit);
  }
  V mask_c(long t, long row, long unit) const { return mask(s_.zoneout_c, s_.kept_c, t, row, s_.hidden, unit); }

  V dropped(long row, long unit, V h) const {
    if (!s_.recurrent_dropout) return h;
    return h * load(s_.recurrent_dropout + Base::column(row) * s_.width() + unit, s_.width() - unit);
  }

  template <class Done>
  void each_own_unit(Done done) const {
    for (long unit = own_.begin; unit < own_.end; unit += W) done(unit, s_.hidden - unit);
  }

  // The packed rows of one step that are a group's, as factors of a product.
  Rows<T> rows_at(T* array, long stride, long t) const {
    return {array + (Base::packed_row(t, 0) - s_.first_grad_row) * stride, stride * Base::groups_};
  }

  const Variant<T>& s_;
  const Range own_, own_h_;
  const long GH_;
};

// Forward ------------------------------------------------------------------------------------------------------------

template <class T>
struct VariantForwardBuffers {
  Rows<T> h[2], h_in[2], u, m, c, new_c;

  VariantForwardBuffers(const Variant<T>& s, Memory& memory, long rows) {
    for (Rows<T>& buffer : h) buffer = memory.rows<T>(rows, s.width());
    for (int i = 0; i < 2; ++i) h_in[i] = s.recurrent_dropout ? memory.rows<T>(rows, s.width()) : h[i];
    if (!s.u) u = memory.rows<T>(rows, s.gates_count() * s.hidden);
    if (s.projected || s.cell == Cell::gru_reset_before) m = memory.rows<T>(rows, s.hidden);
    if (s.cell == Cell::lstm) c = memory.rows<T>(rows, s.hidden), new_c = memory.rows<T>(rows, s.hidden);
  }
};

template <class T, Cell cell>
class VariantForward : VariantMember<T> {
  using Base = VariantMember<T>;
  using Base::active, Base::mine, Base::meet, Base::column, Base::output_row, Base::gates, Base::kept, Base::row_of,
      Base::each_own_unit, Base::optional, Base::is_normalised, Base::s_, Base::own_, Base::own_h_, Base::GH_;
  using V = Vector<T>;
  static constexpr long W = lanes<T>;

 public:
  VariantForward(const Variant<T>& s, Plan plan, long member, Barrier* barrier, Memory memory, long rows)
      : Base(s, plan, member, barrier), buffers_(s, memory, rows) {}

  void run() {
    long count = 0;
    for (long i = 0; i < s_.end - s_.begin; ++i) {
      const long t = s_.reverse ? s_.end - 1 - i : s_.begin + i;
      const bool is_last = i + 1 == s_.end - s_.begin;
      const long previous = count;
      count = mine(active(t));
      const long next = is_last ? 0 : mine(active(s_.reverse ? t - 1 : t + 1));
      now_ = i % 2;
      if (prepare(t, previous, count)) meet();
      step(t, count);
      meet();
      for (long row = next; row < count; ++row) leave(row);
    }
  }

 private:
  // Rows that join take up the carried state, rows that begin a new sequence the initial one.
  bool prepare(long t, long previous, long count) {
    bool has_changed = previous < count;
    for (long row = previous; row < count; ++row) enter(row, s_.h, s_.c);
    if (!s_.reset) return has_changed;
    for (long row = 0; row < count; ++row)
      if (Base::begins(t, row)) enter(row, s_.initial_h, s_.initial_c), has_changed = true;
    return has_changed;
  }

  void enter(long row, const T* h, const T* c) {
    const T* from = h + column(row) * s_.width();
    for (long unit = own_h_.begin; unit < own_h_.end; unit += W) put(row, unit, load(from + unit, s_.width() - unit), now_);
    if constexpr (cell == Cell::lstm) Base::copy(buffers_.c.at(row), c + column(row) * s_.hidden, own_);
  }

  void leave(long row) {
    Base::copy(s_.h + column(row) * s_.width(), buffers_.h[1 - now_].at(row), own_h_);
    if constexpr (cell == Cell::lstm) Base::copy(s_.c + column(row) * s_.hidden, buffers_.c.at(row), own_);
  }

  void put(long row, long unit, V h, int which) {
    store(buffers_.h[which].at(row) + unit, h);
    if (s_.recurrent_dropout) store(buffers_.h_in[which].at(row) + unit, Base::dropped(row, unit, h));
  }

  // h_t, of which zoneout keeps a part as it was.
  void put_h(long t, long row, long unit, V h) {
    if (Base::zones_h()) {
      const V keep = Base::mask_h(t, row, unit);
      h = keep * h_before(row, unit) + (T(1) - keep) * h;
    }
    put(row, unit, h, 1 - now_);
    if (s_.output) store(s_.output + output_row(t, row) * s_.output_stride + unit, h, s_.width() - unit);
  }

  V h_before(long row, long unit) const { return load(buffers_.h[now_].at(row) + unit); }
  T* x(long t, long row) const { return s_.x + row_of(t, row) * GH_; }
  T* u(long t, long row) const { return s_.u ? s_.u + row_of(t, row) * GH_ : buffers_.u.at(row); }

  // Columns [first, first + columns) of u = a . weight.
  void multiply_u(long t, long count, const T* weight, Rows<T> a, long depth, long first, long columns) {
    Base::template product<4>(plain_panels(columns), weight, nullptr, a, depth, count,
                              [&](long row, long unit, const T* tile) {
                                T* to = u(t, row) + first;
                                for (long j = unit; j < unit + 4 * W && j < columns; j += W)
                                  store(to + j, load(tile + j - unit), columns - j);
                              });
    meet();
  }

  // Of `count` columns of a row; kept for the backward pass.
  Norm<T> take_norm(const T* from, long count, long t, long row, int which) const {
    if (!is_normalised()) return {T(0), T(1)};
    const Norm<T> norm = norm_of(from, count);
    if (s_.norms && Base::part_ == 0) {
      T* to = s_.norms + row_of(t, row) * s_.norms_width() + 2 * which;
      to[0] = norm.mean, to[1] = norm.scale;
    }
    return norm;
  }

  V input_part(const T* x, Norm<T> norm, long j, long n) const {
    const V w = load(x + j, n), b = optional(s_.bias_ih, j, n);
    return is_normalised() ? norm.standard(w) * load(s_.gain_ih + j, n) + b : w + b;
  }
  V recurrent_part(const T* u, Norm<T> norm, long j, long n) const {
    const V w = load(u + j, n), b = optional(s_.bias_hh, j, n);
    return is_normalised() ? norm.standard(w) * load(s_.gain_hh + j, n) + b : w + b;
  }

  void step(long t, long count) {
    const long of_h = cell == Cell::gru_reset_before ? 2 * s_.hidden : GH_;
    multiply_u(t, count, s_.weight_hh, buffers_.h_in[now_], s_.width(), 0, of_h);
    for (long row = 0; row < count; ++row) {
      const Norm<T> of_x = take_norm(x(t, row), GH_, t, row, 0), of_u = take_norm(u(t, row), of_h, t, row, 1);
      if constexpr (cell == Cell::lstm) lstm_gates(t, row, of_x, of_u);
      if constexpr (cell == Cell::gru) gru(t, row, of_x, of_u);
      if constexpr (cell == Cell::gru_reset_before) gru_reset_before_gates(t, row, of_x, of_u);
      if constexpr (cell == Cell::rnn_tanh || cell == Cell::rnn_relu) rnn(t, row, of_x, of_u);
    }
    if constexpr (cell == Cell::lstm) lstm_output(t, count);
    if constexpr (cell == Cell::gru_reset_before) gru_reset_before_candidate(t, count);
  }

  void rnn(long t, long row, Norm<T> of_x, Norm<T> of_u) {
    const T *x_row = x(t, row), *u_row = u(t, row);
    each_own_unit([&](long unit, long n) {
      const V a = input_part(x_row, of_x, unit, n) + recurrent_part(u_row, of_u, unit, n);
      const V h = Rnn<T>::step(a, cell == Cell::rnn_relu);
      store(gates(t, row) + unit, h, n);
      put_h(t, row, unit, h);
    });
  }

  void lstm_gates(long t, long row, Norm<T> of_x, Norm<T> of_u) {
    const long H = s_.hidden;
    const T *x_row = x(t, row), *u_row = u(t, row);
    T* gate = gates(t, row);
    const int f_row = s_.is_coupled ? 0 : 1;
    each_own_unit([&](long unit, long n) {
      const auto a = [&](int g) {
        return input_part(x_row, of_x, g * H + unit, n) + recurrent_part(u_row, of_u, g * H + unit, n);
      };
      const auto peephole = [&](int g, V c) { return s_.weight_ch ? load(s_.weight_ch + g * H + unit, n) * c : V{}; };
      const V c_prev = load(buffers_.c.at(row) + unit);
      const V f = sigmoid<T>(a(f_row) + peephole(f_row, c_prev)), g = tanh<T>(a(f_row + 1));
      const V i = s_.is_coupled ? T(1) - f : sigmoid<T>(a(0) + peephole(0, c_prev));
      const V c = next_c(f, c_prev, i, g);
      const V o = sigmoid<T>(a(f_row + 2) + peephole(f_row + 1, c));
      if (!s_.is_coupled) store(gate + unit, i, n);
      store(gate + f_row * H + unit, f, n);
      store(gate + (f_row + 1) * H + unit, g, n);
      store(gate + (f_row + 2) * H + unit, o, n);
      store(buffers_.new_c.at(row) + unit, c);
      V after = c;
      if (Base::zones_c()) {
        const V keep = Base::mask_c(t, row, unit);
        after = keep * c_prev + (T(1) - keep) * c;
      }
      store(buffers_.c.at(row) + unit, after);
      if (s_.kept) store(kept(t, row) + unit, after, n);
      if (!is_normalised()) put_m(t, row, unit, o * tanh<T>(c));
    });
  }

  void put_m(long t, long row, long unit, V m) {
    if (s_.projected)
      store(buffers_.m.at(row) + unit, m);
    else
      put_h(t, row, unit, m);
  }

  void lstm_output(long t, long count) {
    const long H = s_.hidden;
    if (is_normalised()) {
      meet();
      for (long row = 0; row < count; ++row) {
        const T *c = buffers_.new_c.at(row), *o = gates(t, row) + (s_.is_coupled ? 2 : 3) * H;
        const Norm<T> of_c = take_norm(c, H, t, row, 2);
        each_own_unit([&](long unit, long n) {
          const V normal = of_c.standard(load(c + unit)) * load(s_.gain_c + unit, n) + load(s_.shift_c + unit, n);
          put_m(t, row, unit, load(o + unit, n) * tanh<T>(normal));
        });
      }
    }
    if (!s_.projected) return;
    meet();
    Base::template product<4>(plain_panels(s_.projected), s_.weight_hr, nullptr, buffers_.m, H, count,
                              [&](long row, long first, const T* tile) {
                                for (long unit = first; unit < first + 4 * W && unit < s_.projected; unit += W)
                                  put_h(t, row, unit, load(tile + unit - first));
                              });
  }

  void gru(long t, long row, Norm<T> of_x, Norm<T> of_u) {
    const long H = s_.hidden;
    const T *x_row = x(t, row), *u_row = u(t, row);
    T* gate = gates(t, row);
    each_own_unit([&](long unit, long n) {
      const auto in = [&](int g) { return input_part(x_row, of_x, g * H + unit, n); };
      const auto back = [&](int g) { return recurrent_part(u_row, of_u, g * H + unit, n); };
      const V r = sigmoid<T>(in(0) + back(0)), z = sigmoid<T>(in(1) + back(1)), u_n = back(2);
      const V candidate = tanh<T>(in(2) + r * u_n);
      store(gate + unit, r, n);
      store(gate + H + unit, z, n);
      store(gate + 2 * H + unit, candidate, n);
      if (s_.kept) store(kept(t, row) + unit, u_n, n);
      put_h(t, row, unit, Gru<T>::mix(z, candidate, h_before(row, unit)));
    });
  }

  void gru_reset_before_gates(long t, long row, Norm<T> of_x, Norm<T> of_u) {
    const long H = s_.hidden;
    const T *x_row = x(t, row), *u_row = u(t, row);
    T* gate = gates(t, row);
    each_own_unit([&](long unit, long n) {
      const V r = sigmoid<T>(input_part(x_row, of_x, unit, n) + recurrent_part(u_row, of_u, unit, n));
      const V z = sigmoid<T>(input_part(x_row, of_x, H + unit, n) + recurrent_part(u_row, of_u, H + unit, n));
      const V in_n = input_part(x_row, of_x, 2 * H + unit, n);  // before `gates` takes the place of x
      store(gate + unit, r, n);
      store(gate + H + unit, z, n);
      store(gate + 2 * H + unit, in_n, n);
      store(buffers_.m.at(row) + unit, r * load(buffers_.h_in[now_].at(row) + unit));
    });
  }

  void gru_reset_before_candidate(long t, long count) {
    const long H = s_.hidden;
    meet();
    multiply_u(t, count, s_.weight_n, buffers_.m, H, 2 * H, H);
    for (long row = 0; row < count; ++row) {
      const T* u_row = u(t, row);
      T* gate = gates(t, row);
      const Norm<T> of_n = take_norm(u_row + 2 * H, H, t, row, 2);
      each_own_unit([&](long unit, long n) {
        const V candidate = tanh<T>(load(gate + 2 * H + unit, n) + recurrent_part(u_row, of_n, 2 * H + unit, n));
        store(gate + 2 * H + unit, candidate, n);
        put_h(t, row, unit, Gru<T>::mix(load(gate + H + unit, n), candidate, h_before(row, unit)));
      });
    }
  }

  const VariantForwardBuffers<T> buffers_;
  int now_ = 0;
};

// Backward -----------------------------------------------------------------------------------------------------------

template <class T>
struct VariantBackwardBuffers {
  Rows<T> dh, dc, da, da_hh, dn, standard_c, sums;

  VariantBackwardBuffers(const Variant<T>& s, Memory& memory, long rows) {
    dh = memory.rows<T>(rows, s.width());
    sums = memory.rows<T>(s.sum_rows(), s.sum_stride);
    if (s.cell == Cell::lstm) {
      dc = memory.rows<T>(rows, s.hidden);
      dn = memory.rows<T>(rows, s.hidden);
      standard_c = memory.rows<T>(rows, s.hidden);
    }
    if (!s.gain_hh) return;
    da = memory.rows<T>(rows, s.gates_count() * s.hidden);
    da_hh = s.cell == Cell::gru ? memory.rows<T>(rows, s.gates_count() * s.hidden) : da;
  }
};

template <class T, Cell cell>
class VariantBackward : VariantMember<T> {
  using Base = VariantMember<T>;
  using Base::active, Base::mine, Base::meet, Base::column, Base::packed_row, Base::output_row, Base::gates, Base::kept,
      Base::row_of, Base::each_own_unit, Base::norm, Base::is_normalised, Base::rows_at, Base::s_, Base::own_,
      Base::own_h_, Base::GH_;
  using V = Vector<T>;
  static constexpr long W = lanes<T>;

 public:
  VariantBackward(const Variant<T>& s, Plan plan, long member, Barrier* barrier, Memory memory, long rows)
      : Base(s, plan, member, barrier), buffers_(s, memory, rows) {}

  void run() {
    long count = 0;
    for (long i = 0; i < s_.end - s_.begin; ++i) {
      const long t = s_.reverse ? s_.begin + i : s_.end - 1 - i;
      const bool is_last = i + 1 == s_.end - s_.begin;
      const long previous = count;
      count = mine(active(t));
      const long next = is_last ? 0 : mine(active(s_.reverse ? t + 1 : t - 1));
      for (long row = previous; row < count; ++row) enter(row);
      step_backward(t, count);
      if (s_.reset) begin_anew(t, count);
      for (long row = next; row < count; ++row) leave(row);
      add_up(count, is_last);
    }
  }

 private:
  void enter(long row) {
    Base::copy(buffers_.dh.at(row), s_.grad_h + column(row) * s_.width(), own_h_);
    if constexpr (cell == Cell::lstm) Base::copy(buffers_.dc.at(row), s_.grad_c + column(row) * s_.hidden, own_);
  }

  void leave(long row) {
    Base::copy(s_.grad_h + column(row) * s_.width(), buffers_.dh.at(row), own_h_);
    if constexpr (cell == Cell::lstm) Base::copy(s_.grad_c + column(row) * s_.hidden, buffers_.dc.at(row), own_);
  }

  // The state before a sequence's first step was the initial one: its gradient goes there and nothing goes further.
  void begin_anew(long t, long count) {
    for (long row = 0; row < count; ++row) {
      if (!Base::begins(t, row)) continue;
      move(s_.grad_initial_h + column(row) * s_.width(), buffers_.dh.at(row), own_h_);
      if constexpr (cell == Cell::lstm) move(s_.grad_initial_c + column(row) * s_.hidden, buffers_.dc.at(row), own_);
    }
  }

  static void move(T* to, T* from, Range columns) {
    for (long j = columns.begin; j < columns.end; ++j) to[j] += from[j], from[j] = T(0);
  }

  // Sums grow in pieces of a few rows, so that rounding errors grow with the root of the pieces' number.
  void add_up(long count, bool is_last) {
    constexpr long piece = 32;
    rows_summed_ += count;
    if (rows_summed_ < piece && !is_last) return;
    rows_summed_ = 0;
    T* total = s_.sums + Base::group_ * s_.sum_rows() * s_.sum_stride;
    for (long k = 0; k < s_.sum_rows(); ++k)
      each_own_unit([&](long unit, long) {
        T* part = buffers_.sums.at(k) + unit;
        store(total + k * s_.sum_stride + unit, load(total + k * s_.sum_stride + unit) + load(part));
        store(part, V{});
      });
  }
  void add(long k, long unit, V v) {
    T* part = buffers_.sums.at(k) + unit;
    store(part, load(part) + v);
  }
  long G() const { return s_.gates_count(); }
  long at_gain_ih() const { return G() + 1; }
  long at_gain_hh() const { return 2 * G() + 1; }
  long at_gain_c() const { return 3 * G() + 1; }
  long at_weight_ch() const { return 3 * G() + 3; }

  long grad_row(long t, long row) const { return packed_row(t, row) - s_.first_grad_row; }
  T* grad_ih(long t, long row) const { return s_.grad_ih + grad_row(t, row) * s_.grad_stride; }
  T* grad_hh(long t, long row) const { return s_.grad_hh + grad_row(t, row) * s_.grad_stride; }
  // Gradients of the gates before their nonlinearities: where they are normalised they are not yet what the weights get.
  T* da(long t, long row) const { return is_normalised() ? buffers_.da.at(row) : grad_ih(t, row); }
  T* da_hh(long t, long row) const { return is_normalised() ? buffers_.da_hh.at(row) : grad_hh(t, row); }

  const T* h_before(long t, long row) const {
    if (Base::is_first(t, row)) return s_.initial_h + column(row) * s_.width();
    return s_.output + output_row(Base::before(t), row) * s_.output_stride;
  }
  const T* c_before(long t, long row) const {
    if (Base::is_first(t, row)) return s_.initial_c + column(row) * s_.hidden;
    return kept(Base::before(t), row);
  }

  // What reaches the step's new h, from later steps and its own loss; `dh` keeps what zoneout passes by it.
  V reaching(long t, long row, long unit) {
    T* buffer = buffers_.dh.at(row) + unit;
    V dh = load(buffer);
    if (s_.grad_output) dh += load(s_.grad_output + output_row(t, row) * s_.output_stride + unit, s_.width() - unit);
    if (!Base::zones_h()) {
      store(buffer, V{});
      return dh;
    }
    const V keep = Base::mask_h(t, row, unit);
    store(buffer, keep * dh);
    return (T(1) - keep) * dh;
  }

  void step_backward(long t, long count) {
    if (s_.h_in)
      for (long row = 0; row < count; ++row)
        for (long unit = own_h_.begin; unit < own_h_.end; unit += W) {
          const long n = s_.width() - unit;
          store(s_.h_in + grad_row(t, row) * s_.width() + unit, Base::dropped(row, unit, load(h_before(t, row) + unit, n)), n);
        }
    if constexpr (cell == Cell::lstm) step_lstm(t, count);
    if constexpr (cell == Cell::gru) step_gru(t, count);
    if constexpr (cell == Cell::gru_reset_before) step_gru_reset_before(t, count);
    if constexpr (cell == Cell::rnn_tanh || cell == Cell::rnn_relu) step_rnn(t, count);
  }

  // Carry da back over the normalisations of the first `columns` of W_hh h, and of all of W_ih x.
  void through_norms(long t, long count, long columns) {
    if (!is_normalised()) return;
    meet();
    const long H = s_.hidden;
    for (long row = 0; row < count; ++row) {
      const T *d_ih = da(t, row), *d_hh = da_hh(t, row);
      const T *x = s_.x + row_of(t, row) * GH_, *u = s_.u + row_of(t, row) * GH_;
      T *to_ih = grad_ih(t, row), *to_hh = grad_hh(t, row);
      const Norm<T> of_x = norm(t, row, 0), of_u = norm(t, row, 1);
      const Moments<T> m_ih = moments_of(d_ih, s_.gain_ih, x, of_x, GH_);
      const Moments<T> m_hh = moments_of(d_hh, s_.gain_hh, u, of_u, columns);
      each_own_unit([&](long unit, long n) {
        for (long g = 0; g < G(); ++g) {
          const long j = g * H + unit;
          const V standard = of_x.standard(load(x + j, n)), d = load(d_ih + j, n);
          store(to_ih + j, normalise_backward<T>(d, load(s_.gain_ih + j, n), standard, of_x, m_ih), n);
          add(at_gain_ih() + g, unit, d * standard);
          if (j < columns) own_hh(j, g, unit, n, d_hh, u, of_u, m_hh, to_hh);
        }
      });
    }
  }

  void own_hh(long j, long g, long unit, long n, const T* d_hh, const T* u, Norm<T> of_u, Moments<T> m, T* to) {
    const V standard = of_u.standard(load(u + j, n)), d = load(d_hh + j, n);
    store(to + j, normalise_backward<T>(d, load(s_.gain_hh + j, n), standard, of_u, m), n);
    add(at_gain_hh() + g, unit, d * standard);
  }

  // dh = what went past the weights + W_hh^T da.
  void through_weights(long t, long count, long columns) {
    meet();
    Base::template product<4>(plain_panels(s_.width()), s_.weight_hh, nullptr, rows_at(s_.grad_hh, s_.grad_stride, t),
                              columns, count, [&](long row, long first, const T* tile) {
                                T* dh = buffers_.dh.at(row);
                                for (long unit = first; unit < first + 4 * W && unit < s_.width(); unit += W)
                                  store(dh + unit, load(dh + unit) + Base::dropped(row, unit, load(tile + unit - first)));
                              });
  }

  void step_rnn(long t, long count) {
    for (long row = 0; row < count; ++row)
      each_own_unit([&](long unit, long n) {
        const V d = Rnn<T>::step_backward(reaching(t, row, unit), load(gates(t, row) + unit, n), cell == Cell::rnn_relu);
        store(da(t, row) + unit, d, n);
        add(0, unit, d);
      });
    through_norms(t, count, GH_);
    through_weights(t, count, GH_);
  }

  void step_lstm(long t, long count) {
    const long P = s_.projected;
    if (P) {
      for (long row = 0; row < count; ++row)
        for (long unit = own_h_.begin; unit < own_h_.end; unit += W)
          store(s_.grad_hidden + grad_row(t, row) * P + unit, reaching(t, row, unit), P - unit);
      meet();
      Base::template product<4>(plain_panels(s_.hidden), s_.weight_hr, nullptr, rows_at(s_.grad_hidden, P, t), P, count,
                                [&](long row, long first, const T* tile) {
                                  for (long unit = first; unit < first + 4 * W && unit < s_.hidden; unit += W)
                                    lstm_output(t, row, unit, load(tile + unit - first));
                                });
    } else {
      for (long row = 0; row < count; ++row)
        each_own_unit([&](long unit, long) { lstm_output(t, row, unit, reaching(t, row, unit)); });
    }
    if (is_normalised()) meet();
    for (long row = 0; row < count; ++row) lstm_gates(t, row);
    through_norms(t, count, GH_);
    through_weights(t, count, GH_);
  }

  // c_t before zoneout.
  V new_c(long t, long row, long unit, long n) const {
    const long H = s_.hidden;
    if (!Base::zones_c()) return load(kept(t, row) + unit, n);
    const T* gate = gates(t, row) + unit;
    if (!s_.is_coupled) gate += H;
    const V f = load(gate, n), g = load(gate + H, n), i = s_.is_coupled ? T(1) - f : load(gate - H, n);
    return next_c(f, load(c_before(t, row) + unit, n), i, g);
  }

  // dm back over o and tanh: to a_o, and to n_t, which is c_t where it isn't normalised.
  void lstm_output(long t, long row, long unit, V dm) {
    const long H = s_.hidden, n = H - unit, o_row = s_.is_coupled ? 2 : 3;
    V normal = new_c(t, row, unit, n);
    if (is_normalised()) {
      const V standard = norm(t, row, 2).standard(normal);
      store(buffers_.standard_c.at(row) + unit, only<T>(standard, n));
      normal = standard * load(s_.gain_c + unit, n) + load(s_.shift_c + unit, n);
    }
    const V o = load(gates(t, row) + o_row * H + unit, n), tanh_n = tanh<T>(normal);
    const V dn = dm * o * (T(1) - tanh_n * tanh_n);
    if (is_normalised()) {
      add(at_gain_c(), unit, dn * load(buffers_.standard_c.at(row) + unit));
      add(at_gain_c() + 1, unit, dn);
    }
    store(buffers_.dn.at(row) + unit, dn);
    store(da(t, row) + o_row * H + unit, dm * tanh_n * o * (T(1) - o), n);
    if (s_.projected) store(s_.extra + grad_row(t, row) * H + unit, o * tanh_n, n);
  }

  void lstm_gates(long t, long row) {
    const long H = s_.hidden, f_row = s_.is_coupled ? 0 : 1;
    const T *gate = gates(t, row), *c_prev_row = c_before(t, row);
    const T *dn_row = buffers_.dn.at(row), *standard_row = buffers_.standard_c.at(row);
    Norm<T> of_c{};
    Moments<T> m{};
    if (is_normalised()) {
      of_c = norm(t, row, 2);
      m = moments_of(dn_row, s_.gain_c, standard_row, Norm<T>{T(0), T(1)}, H);
    }
    T *d = da(t, row), *dc_row = buffers_.dc.at(row);
    each_own_unit([&](long unit, long n) {
      const V f = load(gate + f_row * H + unit, n), g = load(gate + (f_row + 1) * H + unit, n);
      const V i = s_.is_coupled ? T(1) - f : load(gate + unit, n);
      const V c_prev = load(c_prev_row + unit, n), d_o = load(d + (f_row + 2) * H + unit, n);
      V dc = load(dc_row + unit), kept_dc{}, dn = load(dn_row + unit);
      if (Base::zones_c()) {
        const V keep = Base::mask_c(t, row, unit);
        kept_dc = keep * dc;
        dc = (T(1) - keep) * dc;
      }
      if (is_normalised()) dn = normalise_backward<T>(dn, load(s_.gain_c + unit, n), load(standard_row + unit), of_c, m);
      dc += dn;
      if (s_.weight_ch) {
        dc += d_o * load(s_.weight_ch + (f_row + 1) * H + unit, n);
        add(at_weight_ch() + f_row + 1, unit, d_o * new_c(t, row, unit, n));
      }
      const V d_f = dc * (s_.is_coupled ? c_prev - g : c_prev) * f * (T(1) - f), d_g = dc * i * (T(1) - g * g);
      V before = dc * f + kept_dc;
      if (!s_.is_coupled) {
        const V d_i = dc * g * i * (T(1) - i);
        put_da(d, 0, unit, d_i, n);
        if (s_.weight_ch) before += through_peephole(0, unit, d_i, c_prev, n);
      }
      if (s_.weight_ch) before += through_peephole(f_row, unit, d_f, c_prev, n);
      put_da(d, f_row, unit, d_f, n);
      put_da(d, f_row + 1, unit, d_g, n);
      add(f_row + 2, unit, d_o);
      store(dc_row + unit, before);
    });
  }

  void put_da(T* d, long g, long unit, V v, long n) {
    store(d + g * s_.hidden + unit, v, n);
    add(g, unit, v);
  }

  V through_peephole(long g, long unit, V d, V c_prev, long n) {
    add(at_weight_ch() + g, unit, d * c_prev);
    return d * load(s_.weight_ch + g * s_.hidden + unit, n);
  }

  void step_gru(long t, long count) {
    const long H = s_.hidden;
    for (long row = 0; row < count; ++row) {
      const T *gate = gates(t, row), *h_prev = h_before(t, row), *u_n = kept(t, row);
      T *d_ih = da(t, row), *d_hh = da_hh(t, row), *dh = buffers_.dh.at(row);
      each_own_unit([&](long unit, long n) {
        const V r = load(gate + unit, n), into = reaching(t, row, unit);
        const auto d = Gru<T>::mix_backward(into, load(gate + H + unit, n), load(gate + 2 * H + unit, n),
                                            load(h_prev + unit, n));
        const V a_r = Gru<T>::sigmoid_backward(d.a_n * load(u_n + unit, n), r), du_n = d.a_n * r;
        store(dh + unit, load(dh + unit) + d.h_prev);
        put_da(d_ih, 0, unit, a_r, n);
        put_da(d_ih, 1, unit, d.a_z, n);
        put_da(d_ih, 2, unit, d.a_n, n);
        add(3, unit, du_n);
        store(d_hh + unit, a_r, n);
        store(d_hh + H + unit, d.a_z, n);
        store(d_hh + 2 * H + unit, du_n, n);
      });
    }
    through_norms(t, count, GH_);
    through_weights(t, count, GH_);
  }

  void step_gru_reset_before(long t, long count) {
    const long H = s_.hidden;
    for (long row = 0; row < count; ++row) {
      const T *gate = gates(t, row), *h_prev = h_before(t, row);
      T *d_row = da(t, row), *dh = buffers_.dh.at(row);
      each_own_unit([&](long unit, long n) {
        const auto d = Gru<T>::mix_backward(reaching(t, row, unit), load(gate + H + unit, n),
                                            load(gate + 2 * H + unit, n), load(h_prev + unit, n));
        store(dh + unit, load(dh + unit) + d.h_prev);
        put_da(d_row, 1, unit, d.a_z, n);
        put_da(d_row, 2, unit, d.a_n, n);
      });
    }
    if (is_normalised()) {
      meet();
      for (long row = 0; row < count; ++row) {
        const T *d = da_hh(t, row), *u = s_.u + row_of(t, row) * GH_;
        const Norm<T> of_n = norm(t, row, 2);
        const Moments<T> m = moments_of(d + 2 * H, s_.gain_hh + 2 * H, u + 2 * H, of_n, H);
        each_own_unit([&](long unit, long n) { own_hh(2 * H + unit, 2, unit, n, d, u, of_n, m, grad_hh(t, row)); });
      }
    }
    meet();
    Base::template product<4>(
        plain_panels(H), s_.weight_n, nullptr, rows_at(s_.grad_hh + 2 * H, s_.grad_stride, t), H, count,
        [&](long row, long first, const T* tile) {
          const T *gate = gates(t, row), *before = h_before(t, row);
          T *d_row = da(t, row), *dh = buffers_.dh.at(row);
          for (long unit = first; unit < first + 4 * W && unit < H; unit += W) {
            const long n = H - unit;
            const V dv = load(tile + unit - first), r = load(gate + unit, n);
            const V h_in = Base::dropped(row, unit, load(before + unit, n));
            put_da(d_row, 0, unit, Gru<T>::sigmoid_backward(dv * h_in, r), n);
            store(dh + unit, load(dh + unit) + Base::dropped(row, unit, dv * r));
            store(s_.extra + grad_row(t, row) * H + unit, r * h_in, n);
          }
        });
    through_norms(t, count, 2 * H);
    through_weights(t, count, 2 * H);
  }

  const VariantBackwardBuffers<T> buffers_;
  long rows_summed_ = 0;
};

template <class T>
bool forward(const Variant<T>& s) {
  return Run<T, Variant<T>, VariantForward, VariantForwardBuffers<T>>::go(&s, 1);
}

template <class T>
bool backward(const Variant<T>& s) {
  return Run<T, Variant<T>, VariantBackward, VariantBackwardBuffers<T>>::go(&s, 1);
}

}  // namespace

const VariantKernels<float> variants_f32{forward<float>, backward<float>, most_groups};
const VariantKernels<double> variants_f64{forward<double>, backward<double>, most_groups};

}  // namespace throughtime::THROUGHTIME_ISA
