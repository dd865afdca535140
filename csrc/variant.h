// What the variants' loops have in common: layer normalisation, peepholes, coupled gates, zoneout, recurrent dropout.
//
// A step is cut in phases over a group's rows, between which the members of a group meet: the product with W_hh, whose
// whole row a normalisation needs before any unit can go on; the gates; with an LSTM's c normalised, that. Each member
// takes the statistics of a whole row itself rather than joining parts of them: the bits are then the same whatever the
// number of threads, and nobody has to meet for it.
#pragma once

#include <functional>

#include "loop.h"
#include "norm.h"

namespace throughtime::THROUGHTIME_ISA {

// What both passes have in common. `Loop` is the loop through the steps.
template <class E, class Loop>
class VariantMember : public Loop {
 protected:
  using T = Arithmetic<E>;
  using V = Vector<T>;
  static constexpr long W = lanes<T>;
  using Loop::s_;

  template <class... Of>
  explicit VariantMember(const Variant<E>& variant, long hidden, long gates, Of... of)
      : Loop(of...), v_(variant), GH_(gates * hidden) {}

  bool is_normalised() const { return v_.gain_hh; }
  long row_of(long t, long row) const { return Loop::packed_row(t, row) - s_.first_kept_row; }
  auto gates(long t, long row) const { return s_.gates + row_of(t, row) * GH_; }
  auto kept(long t, long row) const { return s_.kept + row_of(t, row) * s_.hidden; }

  V mask(const uint8_t* zoneout, T share, long t, long row, long width, long unit) const {
    if (!zoneout) return splat(share);
    const uint8_t* from = zoneout + Loop::padded_row(t, row) * width + unit;
    T lane[W] = {};
    for (long l = 0, n = width - unit; l < W && l < n; ++l) lane[l] = T(from[l] != 0);
    return load(lane);
  }
  bool zones_h() const { return v_.zoneout_h || v_.share_h != T(0); }
  bool zones_c() const { return v_.zoneout_c || v_.share_c != T(0); }
  V mask_h(long t, long row, long unit) const { return mask(v_.zoneout_h, v_.share_h, t, row, s_.width(), unit); }
  V mask_c(long t, long row, long unit) const { return mask(v_.zoneout_c, v_.share_c, t, row, s_.hidden, unit); }

  V dropped(long row, long unit, V h) const {
    if (!v_.recurrent_dropout) return h;
    return h * load(v_.recurrent_dropout + Loop::column(row) * s_.width() + unit, s_.width() - unit);
  }

  const Variant<E>& v_;
  const long GH_;
};

// Forward ------------------------------------------------------------------------------------------------------------

template <class E>
struct VariantForwardBuffers {
  using T = Arithmetic<E>;
  Rows<T> h[2], u, in_last, c, new_c, saved_c;
  Rows<E> h_in[2], m;  // what products take

  VariantForwardBuffers(const ForwardCall<E>& s, Memory& memory, long rows) {
    for (Rows<T>& buffer : h) buffer = memory.rows<T>(rows, s.width());
    for (int i = 0; i < 2; ++i) {
      if constexpr (!is_narrow<E>) h_in[i] = h[i];
      if (is_narrow<E> || s.variant->recurrent_dropout) h_in[i] = memory.rows<E>(rows, s.width());
    }
    if (is_narrow<E> || !s.u) u = memory.rows<T>(rows, s.gate_count * s.hidden);
    if (s.projected || s.has_last()) m = memory.rows<E>(rows, s.hidden);
    if (s.has_last()) in_last = memory.rows<T>(rows, s.hidden);
    if (s.facts.has_c) c = memory.rows<T>(rows, s.hidden), new_c = memory.rows<T>(rows, s.hidden);
    if (s.facts.has_c && is_narrow<E> && s.norms) saved_c = memory.rows<T>(rows, s.hidden);
  }
};

// `Cell` is the page that says the facts, `Own` its loop.
template <class E, class Cell, class Own>
class VariantForward : public VariantMember<E, ForwardLoop<E, Own>> {
 public:
  using Loop = ForwardLoop<E, Own>;
  using Base = VariantMember<E, Loop>;
  using T = typename Base::T;
  using V = typename Base::V;
  using Buffers = VariantForwardBuffers<E>;

  VariantForward(const ForwardCall<E>& s, Division division, long member, Barrier* barrier, Memory memory, long rows)
      : Base(*s.variant, s.hidden, s.gate_count, std::cref(s), division, member, barrier), buffers_(s, memory, rows),
        own_(Loop::units(plain_panels(s.hidden))), own_h_(Loop::units(plain_panels(s.width()))),
        joint_width_(s.joint() * s.hidden) {}

 protected:
  friend Loop;
  using Base::s_, Base::v_, Base::GH_, Base::W, Base::row_of, Base::is_normalised, Base::dropped;

  void begin_step(long i) { now_ = i % 2; }

  template <class State>
  void enter(long row, const State* h, const State* c) {
    const State* from = h + Loop::column(row) * s_.width();
    for (long unit = own_h_.begin; unit < own_h_.end; unit += W) put(row, unit, load(from + unit, s_.width() - unit), now_);
    if constexpr (Cell::facts.has_c) Loop::copy(buffers_.c.at(row), c + Loop::column(row) * s_.hidden, own_);
  }

  void leave(long row) {
    Loop::copy(s_.h + Loop::column(row) * s_.width(), buffers_.h[1 - now_].at(row), own_h_);
    if constexpr (Cell::facts.has_c) Loop::copy(s_.c + Loop::column(row) * s_.hidden, buffers_.c.at(row), own_);
  }

  void put(long row, long unit, V h, int which) {
    store(buffers_.h[which].at(row) + unit, h);
    if (is_narrow<E> || v_.recurrent_dropout) store(buffers_.h_in[which].at(row) + unit, dropped(row, unit, h));
  }

  // h_t, of which zoneout keeps a part as it was.
  void put_h(long t, long row, long unit, V h) {
    if (Base::zones_h()) {
      const V keep = Base::mask_h(t, row, unit);
      h = blend(keep, h_before(row, unit), h);
    }
    put(row, unit, h, 1 - now_);
    if (s_.output) store(s_.output + Loop::output_row(t, row) * s_.output_stride + unit, h, s_.width() - unit);
  }

  V h_before(long row, long unit) const { return load(buffers_.h[now_].at(row) + unit); }

  template <class Done>
  THROUGHTIME_INLINE void each_unit(Done done) const {
    for (long unit = own_.begin; unit < own_.end; unit += W) done(unit, s_.hidden - unit);
  }

  const T* x(long t, long row) const {
    return s_.x + (s_.ids ? s_.ids[Loop::packed_row(t, row)] : row_of(t, row)) * GH_;
  }

  // As the backward pass will read it.
  static V rounded(V v) {
    E narrow[W];
    store(narrow, v);
    return load(narrow);
  }

  // W_hh h: where it is normalised and kept narrow, rounded.
  T* u(long t, long row) const {
    if constexpr (!is_narrow<E>)
      if (s_.u) return s_.u + row_of(t, row) * GH_;
    return buffers_.u.at(row);
  }
  void put_u(long t, long row, long j, V v, long n) {
    if constexpr (is_narrow<E>) {
      if (is_normalised()) {
        v = rounded(v);
        if (s_.u) store(s_.u + row_of(t, row) * GH_ + j, v, n);
      }
    }
    store(u(t, row) + j, v, n);
  }

  // The gates' part of W_hh that meets h.
  void joint_product(long t, long count) {
    Loop::unit_product(joint_width_, s_.weight_hh, nullptr, buffers_.h_in[now_], s_.width(), count,
                       [&](long row, long j, V v) { put_u(t, row, j, v, joint_width_ - j); });
    Loop::meet();
  }

  // The last gate's part, which meets m.
  void last_product(long t, long count) {
    Loop::meet();
    Loop::unit_product(s_.hidden, s_.weight_last, nullptr, buffers_.m, s_.hidden, count,
                       [&](long row, long unit, V v) { put_u(t, row, joint_width_ + unit, v, s_.hidden - unit); });
    Loop::meet();
  }

  // The `which`th norm of a step, of `count` columns of a row; kept for the backward pass.
  template <class From>
  Norm<T> take_norm(const From* from, long count, long t, long row, int which) const {
    const Norm<T> norm = norm_of<T>(from, count);
    if (keeps_norms()) keep_norm(norm, t, row, which);
    return norm;
  }
  bool keeps_norms() const { return s_.norms && Loop::part_ == 0; }
  void keep_norm(Norm<T> norm, long t, long row, int which) const {
    T* to = s_.norms + (row_of(t, row) * s_.facts.norms() + which) * 2;
    to[0] = norm.mean, to[1] = norm.scale;
  }

  // done(row, in, back): what a gate gets from W_ih x, in(gate, unit, n), and from W_hh h.
  template <class Done>
  THROUGHTIME_INLINE void each_row(long t, long count, Done done) const {
    for (long row = 0; row < count; ++row) {
      if (is_normalised()) {
        const E* w = s_.w + row_of(t, row) * GH_;
        const Norm<T> of_w = take_norm(w, GH_, t, row, 0), of_u = take_norm(u(t, row), joint_width_, t, row, 1);
        done(row, normalised_part(w, of_w, v_.gain_ih, v_.bias_ih),
             normalised_part(u(t, row), of_u, v_.gain_hh, v_.bias_hh));
      } else {
        done(row, plain_part(x(t, row), v_.bias_ih), plain_part(u(t, row), v_.bias_hh));
      }
    }
  }

  // done(row, back), after last_product; the last gate counts as gate 0.
  template <class Done>
  THROUGHTIME_INLINE void each_row_of_last(long t, long count, Done done) const {
    const long first = joint_width_;
    const T* bias = v_.bias_hh ? v_.bias_hh + first : nullptr;
    for (long row = 0; row < count; ++row) {
      const T* u_row = u(t, row) + first;
      if (is_normalised())
        done(row, normalised_part(u_row, take_norm(u_row, s_.hidden, t, row, 2), v_.gain_hh + first, bias));
      else
        done(row, plain_part(u_row, bias));
    }
  }

  // A function of (gate, unit, n): a row's element with its bias.
  auto plain_part(const T* row, const T* bias) const {
    return [row, bias, H = s_.hidden](long g, long unit, long n) {
      const long j = g * H + unit;
      return load(row + j, n) + (bias ? load(bias + j, n) : V{});
    };
  }
  template <class From>
  auto normalised_part(const From* row, Norm<T> norm, const T* gain, const T* bias) const {
    return [row, norm, gain, bias, H = s_.hidden](long g, long unit, long n) {
      const long j = g * H + unit;
      return normalised<T>(load(row + j, n), norm, load(gain + j, n), bias ? load(bias + j, n) : V{});
    };
  }

  // What the last gate gets from W_ih x, from one phase to the next: the gates' values may take the place of x.
  void put_in_last(long row, long unit, V in) { store(buffers_.in_last.at(row) + unit, in); }
  V in_last(long row, long unit) const { return load(buffers_.in_last.at(row) + unit); }

  const Buffers buffers_;
  const Range own_, own_h_;
  const long joint_width_;
  int now_ = 0;
};

// Backward -----------------------------------------------------------------------------------------------------------

template <class E>
struct VariantBackwardBuffers {
  using T = Arithmetic<E>;
  Rows<T> dh, dc, da, da_hh, dn, standard_c, sums;

  VariantBackwardBuffers(const BackwardCall<E>& s, Memory& memory, long rows) {
    dh = memory.rows<T>(rows, s.width());
    sums = memory.rows<T>(sum_rows(s), sum_stride(s));
    if (s.facts.has_c) {
      dc = memory.rows<T>(rows, s.hidden);
      dn = memory.rows<T>(rows, s.hidden);
      standard_c = memory.rows<T>(rows, s.hidden);
    }
    if (!is_narrow<E> && !s.variant->is_normalised()) return;
    da = memory.rows<T>(rows, s.gate_count * s.hidden);
    da_hh = s.facts.offset_hh ? memory.rows<T>(rows, s.gate_count * s.hidden) : da;
  }
};

template <class E, class Cell, class Own>
class VariantBackward : public VariantMember<E, BackwardLoop<E, Own, Cell::facts.has_c>> {
 public:
  using Loop = BackwardLoop<E, Own, Cell::facts.has_c>;
  using Base = VariantMember<E, Loop>;
  using T = typename Base::T;
  using V = typename Base::V;
  using Buffers = VariantBackwardBuffers<E>;

  VariantBackward(const BackwardCall<E>& s, Division division, long member, Barrier* barrier, Memory memory, long rows)
      : VariantBackward(s, division, member, barrier, Buffers(s, memory, rows)) {}

 protected:
  friend Loop;
  using Base::s_, Base::v_, Base::GH_, Base::W, Base::is_normalised, Base::dropped, Loop::dh_, Loop::own_, Loop::own_h_,
      Loop::grad_row, Loop::grad_ih, Loop::row_of;

  void begin_step(long) {}

  void step(long t, long count) {
    for (long row = 0; row < count; ++row)
      for (long unit = own_h_.begin; unit < own_h_.end; unit += W) {
        const long n = s_.width() - unit;
        store(s_.h_in + grad_row(t, row) * s_.width() + unit, dropped(row, unit, load(Loop::h_before(t, row) + unit, n)), n);
      }
    static_cast<Own&>(*this).step_cell(t, count);
  }

  // Sums grow in pieces of a few rows, so that rounding errors grow with the root of the pieces' number.
  void end_step(long count, bool is_last) {
    constexpr long piece = 32;
    rows_summed_ += count;
    if (rows_summed_ < piece && !is_last) return;
    rows_summed_ = 0;
    const long rows = sum_rows(s_), stride = sum_stride(s_);
    T* total = s_.sums + Loop::group_ * rows * stride;
    for (long k = 0; k < rows; ++k)
      each_unit([&](long unit, long) {
        T* part = buffers_.sums.at(k) + unit;
        store(total + k * stride + unit, load(total + k * stride + unit) + load(part));
        store(part, V{});
      });
  }
  void add(long k, long unit, V v) {
    T* part = buffers_.sums.at(k) + unit;
    store(part, load(part) + v);
  }
  long G() const { return s_.gate_count; }
  long at_gain_ih() const { return G() + 1; }
  long at_gain_hh() const { return 2 * G() + 1; }
  long at_gain_c() const { return 3 * G() + 1; }
  long at_weight_ch() const { return 3 * G() + 3; }

  template <class Done>
  THROUGHTIME_INLINE void each_unit(Done done) const {
    for (long unit = own_.begin; unit < own_.end; unit += W) done(unit, s_.hidden - unit);
  }

  // The packed rows of one step that are a group's, as factors of a product.
  Rows<E> rows_at(E* array, long stride, long t) const {
    return {array + grad_row(t, 0) * stride, stride * Loop::groups_};
  }

  E* grad_hh(long t, long row) const { return s_.grad_hh + grad_row(t, row) * s_.grad_stride; }

  // Gradients of the gates before their nonlinearities, where they grow: what the weights get comes of it by `through_norms`, or
  // is the same.
  T* da(long t, long row) const {
    if constexpr (!is_narrow<E>)
      if (!is_normalised()) return grad_ih(t, row);
    return buffers_.da.at(row);
  }
  T* da_hh(long t, long row) const {
    if constexpr (!is_narrow<E>)
      if (!is_normalised()) return grad_hh(t, row);
    return buffers_.da_hh.at(row);
  }
  void put_da(T* d, long g, long unit, V v, long n) {
    store(d + g * s_.hidden + unit, v, n);
    add(g, unit, v);
  }

  // One of a step's norms.
  Norm<T> norm(long t, long row, int which) const {
    const T* it = s_.norms + (row_of(t, row) * s_.facts.norms() + which) * 2;
    return {it[0], it[1]};
  }

  // What reaches the step's new h, from later steps and its own loss; `dh` keeps what zoneout passes by it.
  V reaching(long t, long row, long unit) {
    T* buffer = dh_.at(row) + unit;
    V dh = load(buffer);
    if (const E* loss = Loop::own_loss(t, row)) dh += load(loss + unit, s_.width() - unit);
    if (!Base::zones_h()) {
      store(buffer, V{});
      return dh;
    }
    const V keep = Base::mask_h(t, row, unit);
    store(buffer, keep * dh);
    return (T(1) - keep) * dh;
  }

  // Carry da back over the last gate's normalisation and weights: done(row, unit, dm).
  template <class Done>
  THROUGHTIME_INLINE void through_last(long t, long count, Done done) {
    const long H = s_.hidden, first = s_.joint() * H, g = s_.joint();
    if (is_normalised()) {
      Loop::meet();
      for (long row = 0; row < count; ++row) {
        const T* d = da_hh(t, row);
        const E* u = s_.u + row_of(t, row) * GH_;
        const Norm<T> of_last = norm(t, row, 2);
        const Moments<T> m = moments_of<T>(d + first, v_.gain_hh + first, u + first, of_last, H);
        each_unit([&](long unit, long n) { own_hh(first + unit, g, unit, n, d, u, of_last, m, grad_hh(t, row)); });
      }
    } else {
      round_da(t, count, g, g + 1);
    }
    Loop::meet();
    Loop::unit_product(H, s_.weight_last, nullptr, rows_at(s_.grad_hh + first, s_.grad_stride, t), H, count, done);
  }

  // Carry da back over W_hh and what is around it: to dh, and to what the products after the loop take.
  void through_joint(long t, long count) {
    if (is_normalised())
      through_norms(t, count);
    else
      round_da(t, count, 0, G());
    Loop::meet();
    Loop::unit_product(s_.width(), s_.weight_hh, nullptr, rows_at(s_.grad_hh, s_.grad_stride, t), s_.joint() * s_.hidden, count,
                       [&](long row, long unit, V v) {
                         T* dh = dh_.at(row) + unit;
                         store(dh, load(dh) + dropped(row, unit, v));
                       });
  }

  const Buffers buffers_;

 private:
  VariantBackward(const BackwardCall<E>& s, Division division, long member, Barrier* barrier, const Buffers& buffers)
      : Base(*s.variant, s.hidden, s.gate_count, std::cref(s), division, member, barrier, buffers.dh, buffers.dc),
        buffers_(buffers) {}

  // Where elements are narrow da grows at full width; then they go, rounded, to the place from which products take them.
  void round_da(long t, long count, long first, long last) {
    if constexpr (is_narrow<E>)
      for (long row = 0; row < count; ++row) {
        const T *d_ih = da(t, row), *d_hh = da_hh(t, row);
        E *to_ih = grad_ih(t, row), *to_hh = grad_hh(t, row);
        each_unit([&](long unit, long n) {
          for (long j = first * s_.hidden + unit; j < last * s_.hidden; j += s_.hidden) {
            store(to_ih + j, load(d_ih + j, n), n);
            if (to_hh != to_ih) store(to_hh + j, load(d_hh + j, n), n);
          }
        });
      }
  }

  // Back over the normalisations of what the joint gates get from W_hh h, and of all of W_ih x.
  void through_norms(long t, long count) {
    Loop::meet();
    const long H = s_.hidden, columns = s_.joint() * H;
    for (long row = 0; row < count; ++row) {
      const T *d_ih = da(t, row), *d_hh = da_hh(t, row);
      const E *w = s_.w + row_of(t, row) * GH_, *u = s_.u + row_of(t, row) * GH_;
      E *to_ih = grad_ih(t, row), *to_hh = grad_hh(t, row);
      const Norm<T> of_w = norm(t, row, 0), of_u = norm(t, row, 1);
      const Moments<T> m_ih = moments_of<T>(d_ih, v_.gain_ih, w, of_w, GH_);
      const Moments<T> m_hh = moments_of<T>(d_hh, v_.gain_hh, u, of_u, columns);
      each_unit([&](long unit, long n) {
        for (long g = 0; g < G(); ++g) {
          const long j = g * H + unit;
          const V standard = of_w.standard(load(w + j, n)), d = load(d_ih + j, n);
          store(to_ih + j, normalise_backward<T>(d, load(v_.gain_ih + j, n), standard, of_w, m_ih), n);
          add(at_gain_ih() + g, unit, d * standard);
          if (j < columns) own_hh(j, g, unit, n, d_hh, u, of_u, m_hh, to_hh);
        }
      });
    }
  }

  void own_hh(long j, long g, long unit, long n, const T* d_hh, const E* u, Norm<T> of_u, Moments<T> m, E* to) {
    const V standard = of_u.standard(load(u + j, n)), d = load(d_hh + j, n);
    store(to + j, normalise_backward<T>(d, load(v_.gain_hh + j, n), standard, of_u, m), n);
    add(at_gain_hh() + g, unit, d * standard);
  }

  long rows_summed_ = 0;
};

}  // namespace throughtime::THROUGHTIME_ISA
