// The time loop, forward and backward. Compiled once for each instruction set.
//
// What crosses between the members of a group (member.h) is only h (forward) and da (backward), and both are kept twice,
// this step's and the next one's, so one meeting in a step is enough for most cells.
#include "sequence.h"

#include <cstdlib>
#include <cstring>

#include "cells.h"
#include "cotangents.h"
#include "dense.h"
#include "memory.h"
#include "member.h"
#include "variants.h"

namespace throughtime::THROUGHTIME_ISA {
namespace {

// Panels: how many gates' columns lie side by side, so that a unit's gates come out of one product together.
PanelShape recurrent_panels(const Layout& s) {
  switch (s.cell) {
    case Cell::lstm: return {4, 1, s.hidden};
    case Cell::gru: return {3, 1, s.hidden};
    case Cell::gru_reset_before: return {2, 2, s.hidden};  // r and z; n has a product of its own
    default: return {1, 4, s.hidden};
  }
}

// Gates whose gradients meet W_hh in one product: all, but for the n of a GRU with the reset gate before the product.
int joint_gates(Cell cell) { return cell == Cell::gru_reset_before ? 2 : gate_count(cell); }

template <class E>
PackedSizes forward_sizes(const Layout& s) {
  PackedSizes sizes{};
  sizes.weight_hh = packed_size<E>(recurrent_panels(s), s.width());
  if (s.cell == Cell::gru_reset_before) sizes.weight_n = packed_size<E>(plain_panels(s.hidden), s.hidden);
  if (s.projected) sizes.weight_hr = packed_size<E>(plain_panels(s.projected), s.hidden);
  using T = Arithmetic<E>;
  sizes.bias = 2 * packed_size<T>(recurrent_panels(s), 1) + packed_size<T>(plain_panels(s.hidden), 1);
  return sizes;
}

template <class E>
PackedSizes backward_sizes(const Layout& s) {
  PackedSizes sizes{};
  sizes.weight_hh = packed_size<E>(plain_panels(s.width()), joint_gates(s.cell) * s.hidden);
  if (s.cell == Cell::gru_reset_before) sizes.weight_n = packed_size<E>(plain_panels(s.hidden), s.hidden);
  if (s.projected) sizes.weight_hr = packed_size<E>(plain_panels(s.hidden), s.projected);
  return sizes;
}

template <class T>
void pack_bias(PanelShape shape, const T* bias, T* packed) {
  if (bias)
    pack_panels<T>(shape, 1, bias, 1, 1, 0, panel_count<T>(shape), packed);
  else
    memset(packed, 0, sizeof(T) * packed_size<T>(shape, 1));
}

// The packed bias has three parts: what starts the product, what is added to it, and (reset before) n's.
template <class E>
void pack_forward(const Layout& s, const Arithmetic<E>* weight_hh, const Arithmetic<E>* weight_hr,
                  const Arithmetic<E>* bias_ih, const Arithmetic<E>* bias_hh, E* packed_hh, E* packed_n, E* packed_hr,
                  Arithmetic<E>* packed_bias) {
  using T = Arithmetic<E>;
  const PanelShape shape = recurrent_panels(s);
  const long H = s.hidden, P = s.width(), bias_size = packed_size<T>(shape, 1);
  pack<E>({shape, P, weight_hh, P, 1, packed_hh}, s.threads);
  pack_bias<T>(shape, bias_hh, packed_bias);
  pack_bias<T>(shape, bias_ih, packed_bias + bias_size);
  if (s.cell == Cell::gru_reset_before) {
    pack<E>({plain_panels(H), H, weight_hh + 2 * H * H, H, 1, packed_n}, s.threads);
    T* bias_n = packed_bias + 2 * bias_size;
    pack_bias<T>(plain_panels(H), bias_ih ? bias_ih + 2 * H : nullptr, bias_n);
    if (bias_hh)
      for (long j = 0; j < H; ++j) bias_n[j] += bias_hh[2 * H + j];  // one gate: panels of a bias are in order
  }
  if (s.projected) pack<E>({plain_panels(P), H, weight_hr, H, 1, packed_hr}, s.threads);
}

template <class E>
void pack_backward(const Layout& s, const Arithmetic<E>* weight_hh, const Arithmetic<E>* weight_hr, E* packed_hh,
                   E* packed_n, E* packed_hr) {
  const long H = s.hidden, P = s.width();
  pack<E>({plain_panels(P), joint_gates(s.cell) * H, weight_hh, 1, P, packed_hh}, s.threads);
  if (s.cell == Cell::gru_reset_before) pack<E>({plain_panels(H), H, weight_hh + 2 * H * H, 1, H, packed_n}, s.threads);
  if (s.projected) pack<E>({plain_panels(H), P, weight_hr, 1, H, packed_hr}, s.threads);
}

// Forward ------------------------------------------------------------------------------------------------------------

template <class E>
struct ForwardBuffers {
  using T = Arithmetic<E>;
  Rows<E> h[2], m;  // what products take
  Rows<T> state;    // h, where that is narrower
  Rows<T> c;

  ForwardBuffers(const Forward<E>& s, Memory& memory, long rows) {
    for (Rows<E>& buffer : h) buffer = memory.rows<E>(rows, s.width());
    if (s.projected || s.cell == Cell::gru_reset_before) m = memory.rows<E>(rows, s.hidden);
    if (is_narrow<E>) state = memory.rows<T>(rows, s.width());
    if (s.cell == Cell::lstm) c = memory.rows<T>(rows, s.hidden);
  }
};

template <class E, Cell cell>
class ForwardMember : Member<E> {
  using T = Arithmetic<E>;
  using Base = Member<E>;
  using Base::active, Base::mine, Base::meet, Base::column, Base::packed_row, Base::output_row;
  using V = Vector<T>;
  static constexpr long W = lanes<T>;

 public:
  ForwardMember(const Forward<E>& s, Plan plan, long member, Barrier* barrier, Memory memory, long rows)
      : Base(s, plan, member, barrier), s_(s), buffers_(s, memory, rows), own_h_(Base::units(plain_panels(s.width()))),
        own_c_(Base::units(recurrent_panels(s))) {}

  void run() {
    long count = 0;
    for (long i = 0; i < s_.end - s_.begin; ++i) {
      const long t = s_.reverse ? s_.end - 1 - i : s_.begin + i;
      const bool is_last = i + 1 == s_.end - s_.begin;
      const long previous = count;
      count = mine(active(t));
      const long next = is_last ? 0 : mine(active(s_.reverse ? t - 1 : t + 1));
      now_ = buffers_.h[i % 2];
      next_ = buffers_.h[1 - i % 2];
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

  template <class State>
  void enter(long row, const State* h, const State* c) {
    Base::copy(now_.at(row), h + column(row) * s_.width(), own_h_);
    if constexpr (is_narrow<E>) Base::copy(buffers_.state.at(row), h + column(row) * s_.width(), own_h_);
    if constexpr (cell == Cell::lstm) Base::copy(buffers_.c.at(row), c + column(row) * s_.hidden, own_c_);
  }

  void leave(long row) {
    Base::copy(s_.h + column(row) * s_.width(), state(next_, row), own_h_);
    if constexpr (cell == Cell::lstm) Base::copy(s_.c + column(row) * s_.hidden, buffers_.c.at(row), own_c_);
  }

  long gates_place(long t, long row) const { return (packed_row(t, row) - s_.first_row) * G * s_.hidden; }
  T* x(long t, long row) const {
    return s_.x + (s_.ids ? s_.ids[packed_row(t, row)] * G * s_.hidden : gates_place(t, row));
  }
  E* gates(long t, long row) const { return s_.gates + gates_place(t, row); }
  E* kept(long t, long row) const { return s_.kept + (packed_row(t, row) - s_.first_row) * s_.hidden; }
  E* output(long t, long row) const { return s_.output + output_row(t, row) * s_.output_stride; }

  // h at full width, of which `h` is what the products take.
  const T* state(Rows<E> h, long row) const {
    if constexpr (is_narrow<E>)
      return buffers_.state.at(row);
    else
      return h.at(row);
  }

  void put_h(long t, long row, long unit, V h) {
    store(next_.at(row) + unit, h);
    if constexpr (is_narrow<E>) store(buffers_.state.at(row) + unit, h);
    if (s_.output) store(output(t, row) + unit, h, s_.width() - unit);
  }

  void step(long t, long count) {
    if constexpr (cell == Cell::lstm) step_lstm(t, count);
    if constexpr (cell == Cell::gru) step_gru(t, count);
    if constexpr (cell == Cell::gru_reset_before) step_gru_reset_before(t, count);
    if constexpr (cell == Cell::rnn_tanh || cell == Cell::rnn_relu) step_rnn(t, count);
  }

  const T* added_bias() const { return s_.bias + packed_size<T>(recurrent_panels(s_), 1); }

  void step_rnn(long t, long count) {
    const long H = s_.hidden;
    const T* bias = added_bias();
    Base::template product<4>(recurrent_panels(s_), s_.weight_hh, s_.bias, now_, H, count, [&](long row, long first, const T* tile) {
      const T* x = this->x(t, row);
      for (long unit = first; unit < first + 4 * W && unit < H; unit += W) {
        const V a = load(tile + unit - first) + (load(x + unit, H - unit) + load(bias + unit));
        put_h(t, row, unit, Rnn<T>::step(a, cell == Cell::rnn_relu));
      }
    });
  }

  void step_lstm(long t, long count) {
    const long H = s_.hidden;
    const T* bias = added_bias();
    Base::template product<4>(recurrent_panels(s_), s_.weight_hh, s_.bias, now_, s_.width(), count,
               [&](long row, long unit, const T* tile) {
                 const T* x = this->x(t, row) + unit;
                 T* c = buffers_.c.at(row) + unit;
                 const T* b = bias + unit * 4;
                 const long n = H - unit;
                 const auto it = Lstm<T>::step(load(tile) + (load(x, n) + load(b)),
                                               load(tile + W) + (load(x + H, n) + load(b + W)),
                                               load(tile + 2 * W) + (load(x + 2 * H, n) + load(b + 2 * W)),
                                               load(tile + 3 * W) + (load(x + 3 * H, n) + load(b + 3 * W)), load(c));
                 store(c, it.c);
                 if (s_.kept) {
                   E* gate = gates(t, row) + unit;
                   store(gate, it.i, n);
                   store(gate + H, it.f, n);
                   store(gate + 2 * H, it.g, n);
                   store(gate + 3 * H, it.o, n);
                   store(kept(t, row) + unit, it.c, n);
                 }
                 if (s_.projected)
                   store(buffers_.m.at(row) + unit, it.m);
                 else
                   put_h(t, row, unit, it.m);
               });
    if (!s_.projected) return;
    meet();
    Base::template product<4>(plain_panels(s_.projected), s_.weight_hr, nullptr, buffers_.m, H, count,
               [&](long row, long first, const T* tile) {
                 for (long unit = first; unit < first + 4 * W && unit < s_.projected; unit += W)
                   put_h(t, row, unit, load(tile + unit - first));
               });
  }

  void step_gru(long t, long count) {
    const long H = s_.hidden;
    const T* bias = added_bias();
    Base::template product<3>(recurrent_panels(s_), s_.weight_hh, s_.bias, now_, H, count, [&](long row, long unit, const T* tile) {
      const T* x = this->x(t, row) + unit;
      const T* b = bias + unit * 3;
      const long n = H - unit;
      const V r = sigmoid<T>(load(tile) + (load(x, n) + load(b)));
      const V z = sigmoid<T>(load(tile + W) + (load(x + H, n) + load(b + W)));
      const V u = load(tile + 2 * W);
      const V candidate = tanh<T>(load(x + 2 * H, n) + load(b + 2 * W) + r * u);
      if (s_.kept) {
        E* gate = gates(t, row) + unit;
        store(gate, r, n);
        store(gate + H, z, n);
        store(gate + 2 * H, candidate, n);
        store(kept(t, row) + unit, u, n);
      }
      put_h(t, row, unit, Gru<T>::mix(z, candidate, load(state(now_, row) + unit)));
    });
  }

  void step_gru_reset_before(long t, long count) {
    const long H = s_.hidden;
    const T* bias = added_bias();
    Base::template product<4>(recurrent_panels(s_), s_.weight_hh, s_.bias, now_, H, count, [&](long row, long first, const T* tile) {
      for (long u = 0; u < 2 && first + u * W < H; ++u) {
        const long unit = first + u * W, n = H - unit;
        T* x = this->x(t, row) + unit;
        const T* b = bias + (first * 2 + u * 2 * W);
        const V r = sigmoid<T>(load(tile + 2 * u * W) + (load(x, n) + load(b)));
        const V z = sigmoid<T>(load(tile + (2 * u + 1) * W) + (load(x + H, n) + load(b + W)));
        store(x + H, z, n);
        if (s_.gates) {
          E* gate = gates(t, row) + unit;
          store(gate, r, n);
          store(gate + H, z, n);
        }
        store(buffers_.m.at(row) + unit, r * load(state(now_, row) + unit));
      }
    });
    meet();
    const T* bias_n = s_.bias + 2 * packed_size<T>(recurrent_panels(s_), 1);
    Base::template product<4>(plain_panels(H), s_.weight_n, bias_n, buffers_.m, H, count, [&](long row, long first, const T* tile) {
      const T* x = this->x(t, row);
      for (long unit = first; unit < first + 4 * W && unit < H; unit += W) {
        const long n = H - unit;
        const V candidate = tanh<T>(load(tile + unit - first) + load(x + 2 * H + unit, n));
        const V z = load(x + H + unit, n);
        if (s_.gates) store(gates(t, row) + 2 * H + unit, candidate, n);
        put_h(t, row, unit, Gru<T>::mix(z, candidate, load(state(now_, row) + unit)));
      }
    });
  }

  static constexpr long G = gate_count(cell);
  const Forward<E>& s_;
  const ForwardBuffers<E> buffers_;
  const Range own_h_, own_c_;
  Rows<E> now_, next_;
};

// Backward -----------------------------------------------------------------------------------------------------------

template <class E>
struct BackwardBuffers {
  using T = Arithmetic<E>;
  Rows<T> dh, dc;
  Rows<E> da[2], da_n, projected_dh;  // what products take

  BackwardBuffers(const Backward<E>& s, Memory& memory, long rows) {
    dh = memory.rows<T>(rows, s.width());
    if (s.cell == Cell::lstm) dc = memory.rows<T>(rows, s.hidden);
    for (Rows<E>& buffer : da) buffer = memory.rows<E>(rows, joint_gates(s.cell) * s.hidden);
    if (s.cell == Cell::gru_reset_before) da_n = memory.rows<E>(rows, s.hidden);
    if (s.projected) projected_dh = memory.rows<E>(rows, s.projected);
  }
};

template <class E, Cell cell>
class BackwardMember : Member<E> {
  using T = Arithmetic<E>;
  using Base = Member<E>;
  using Base::active, Base::mine, Base::meet, Base::column, Base::packed_row, Base::output_row;
  using V = Vector<T>;
  static constexpr long W = lanes<T>;

 public:
  BackwardMember(const Backward<E>& s, Plan plan, long member, Barrier* barrier, Memory memory, long rows)
      : Base(s, plan, member, barrier), s_(s), buffers_(s, memory, rows), own_h_(Base::units(plain_panels(s.width()))),
        own_(Base::units(plain_panels(s.hidden))) {}

  void run() {
    long count = 0;
    for (long i = 0; i < s_.end - s_.begin; ++i) {
      const long t = s_.reverse ? s_.begin + i : s_.end - 1 - i;
      const bool is_last = i + 1 == s_.end - s_.begin;
      const long previous = count;
      count = mine(active(t));
      const long next = is_last ? 0 : mine(active(s_.reverse ? t + 1 : t - 1));
      da_ = buffers_.da[i % 2];
      for (long row = previous; row < count; ++row) enter(row);
      if (s_.h_prev)
        for (long row = 0; row < count; ++row)
          Base::copy(s_.h_prev + grad_row(t, row) * s_.width(), h_before(t, row), own_h_);
      step_backward(t, count);
      if (s_.reset) begin_anew(t, count);
      for (long row = next; row < count; ++row) leave(row);
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

  long grad_row(long t, long row) const { return packed_row(t, row) - s_.first_grad_row; }
  long row_of(long t, long row) const { return packed_row(t, row) - s_.first_row; }
  const E* gates(long t, long row) const { return s_.gates + row_of(t, row) * G * s_.hidden; }
  const E* kept(long t, long row) const { return s_.kept + row_of(t, row) * s_.hidden; }
  E* grad_gates(long t, long row) const {
    return s_.grad_gates + grad_row(t, row) * s_.grad_stride;
  }
  const E* h_before(long t, long row) const {
    if (Base::is_first(t, row)) return s_.initial_h + column(row) * s_.width();
    return s_.output + output_row(Base::before(t), row) * s_.output_stride;
  }
  const E* c_before(long t, long row) const {
    if (Base::is_first(t, row)) return s_.initial_c + column(row) * s_.hidden;
    return kept(Base::before(t), row);
  }
  const E* grad_output(long t, long row) const { return s_.grad_output + output_row(t, row) * s_.output_stride; }

  // What reaches h_t: from later steps, and from the step's own loss.
  V reaching(long row, long unit, const E* own_loss) const {
    const V dh = load(buffers_.dh.at(row) + unit);
    return own_loss ? dh + load(own_loss + unit, s_.width() - unit) : dh;
  }
  const E* own_loss(long t, long row) const { return s_.grad_output ? grad_output(t, row) : nullptr; }

  void step_backward(long t, long count) {
    if constexpr (cell == Cell::lstm) step_lstm(t, count);
    if constexpr (cell == Cell::gru) step_gru(t, count);
    if constexpr (cell == Cell::gru_reset_before) step_gru_reset_before(t, count);
    if constexpr (cell == Cell::rnn_tanh || cell == Cell::rnn_relu) step_rnn(t, count);
  }

  // dh = what went past the weights, if anything, + W_hh^T da.
  void through_weights(long count, bool has_bypass) {
    meet();
    Base::template product<4>(plain_panels(s_.width()), s_.weight_hh, nullptr, da_, joint_gates(cell) * s_.hidden, count,
               [&](long row, long first, const T* tile) {
                 T* dh = buffers_.dh.at(row);
                 for (long unit = first; unit < first + 4 * W && unit < s_.width(); unit += W) {
                   const V through = load(tile + unit - first);
                   store(dh + unit, has_bypass ? load(dh + unit) + through : through);
                 }
               });
  }

  void step_rnn(long t, long count) {
    const long H = s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E* h = s_.output + output_row(t, row) * s_.output_stride;
      const E* loss = own_loss(t, row);
      E* grad = grad_gates(t, row);
      for (long unit = own_.begin; unit < own_.end; unit += W) {
        const long n = H - unit;
        const V da = Rnn<T>::step_backward(reaching(row, unit, loss), load(h + unit, n), cell == Cell::rnn_relu);
        store(da_.at(row) + unit, da, n);
        store(grad + unit, da, n);
      }
    }
    through_weights(count, false);
  }

  void lstm_unit(long t, long row, long unit, V dm) {
    const long H = s_.hidden, n = H - unit;
    const E* gate = gates(t, row) + unit;
    T* dc = buffers_.dc.at(row) + unit;
    const auto d = Lstm<T>::step_backward(dm, load(dc), load(gate, n), load(gate + H, n), load(gate + 2 * H, n),
                                          load(gate + 3 * H, n), load(kept(t, row) + unit, n),
                                          load(c_before(t, row) + unit, n));
    store(dc, d.c_prev);
    E* grad = grad_gates(t, row) + unit;
    E* da = da_.at(row) + unit;
    const V parts[] = {d.a_i, d.a_f, d.a_g, d.a_o};
    for (int g = 0; g < 4; ++g) {
      store(da + g * H, parts[g], n);
      store(grad + g * H, parts[g], n);
    }
    if (s_.projected) store(s_.extra + grad_row(t, row) * H + unit, d.m, n);
  }

  void step_lstm(long t, long count) {
    if (s_.projected) {
      for (long row = 0; row < count; ++row)
        for (long unit = own_h_.begin; unit < own_h_.end; unit += W) {
          const V dh = reaching(row, unit, own_loss(t, row));
          store(buffers_.projected_dh.at(row) + unit, dh);
          store(s_.grad_hidden + grad_row(t, row) * s_.projected + unit, dh, s_.projected - unit);
        }
      meet();
      Base::template product<4>(plain_panels(s_.hidden), s_.weight_hr, nullptr, buffers_.projected_dh, s_.projected, count,
                 [&](long row, long first, const T* tile) {
                   for (long unit = first; unit < first + 4 * W && unit < s_.hidden; unit += W)
                     lstm_unit(t, row, unit, load(tile + unit - first));
                 });
    } else {
      for (long row = 0; row < count; ++row)
        for (long unit = own_.begin; unit < own_.end; unit += W)
          lstm_unit(t, row, unit, reaching(row, unit, own_loss(t, row)));
    }
    through_weights(count, false);
  }

  void step_gru(long t, long count) {
    const long H = s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E* gate = gates(t, row);
      const E* h_prev = h_before(t, row);
      const E* loss = own_loss(t, row);
      const E* u = kept(t, row);
      E* grad = grad_gates(t, row);
      E* da = da_.at(row);
      for (long unit = own_.begin; unit < own_.end; unit += W) {
        const long n = H - unit;
        const V r = load(gate + unit, n);
        const auto d = Gru<T>::mix_backward(reaching(row, unit, loss), load(gate + H + unit, n),
                                            load(gate + 2 * H + unit, n), load(h_prev + unit, n));
        const V a_r = Gru<T>::sigmoid_backward(d.a_n * load(u + unit, n), r);
        const V du = d.a_n * r;
        store(buffers_.dh.at(row) + unit, d.h_prev);
        store(da + unit, a_r, n);
        store(da + H + unit, d.a_z, n);
        store(da + 2 * H + unit, du, n);
        store(grad + unit, d.a_n, n);
        store(grad + H + unit, a_r, n);
        store(grad + 2 * H + unit, d.a_z, n);
        store(grad + 3 * H + unit, du, n);
      }
    }
    through_weights(count, true);
  }

  void step_gru_reset_before(long t, long count) {
    const long H = s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E* gate = gates(t, row);
      const E* h_prev = h_before(t, row);
      const E* loss = own_loss(t, row);
      E* grad = grad_gates(t, row);
      for (long unit = own_.begin; unit < own_.end; unit += W) {
        const long n = H - unit;
        const auto d = Gru<T>::mix_backward(reaching(row, unit, loss), load(gate + H + unit, n),
                                            load(gate + 2 * H + unit, n), load(h_prev + unit, n));
        store(buffers_.dh.at(row) + unit, d.h_prev);
        store(buffers_.da_n.at(row) + unit, d.a_n, n);
        store(da_.at(row) + H + unit, d.a_z, n);
        store(grad + H + unit, d.a_z, n);
        store(grad + 2 * H + unit, d.a_n, n);
      }
    }
    meet();
    Base::template product<4>(plain_panels(H), s_.weight_n, nullptr, buffers_.da_n, H, count,
               [&](long row, long first, const T* tile) {
                 const E* gate = gates(t, row);
                 const E* before = h_before(t, row);
                 T* dh = buffers_.dh.at(row);
                 for (long unit = first; unit < first + 4 * W && unit < H; unit += W) {
                   const long n = H - unit;
                   const V dv = load(tile + unit - first), r = load(gate + unit, n), h_prev = load(before + unit, n);
                   const V a_r = Gru<T>::sigmoid_backward(dv * h_prev, r);
                   store(dh + unit, load(dh + unit) + dv * r);
                   store(da_.at(row) + unit, a_r, n);
                   store(grad_gates(t, row) + unit, a_r, n);
                   store(s_.extra + grad_row(t, row) * H + unit, r * h_prev, n);
                 }
               });
    through_weights(count, true);
  }

  static constexpr long G = gate_count(cell);
  const Backward<E>& s_;
  const BackwardBuffers<E> buffers_;
  const Range own_h_, own_;
  Rows<E> da_;
};

// Calls --------------------------------------------------------------------------------------------------------------

template <class E>
bool forward(const Forward<E>* calls, int count) {
  return Run<E, Forward<E>, ForwardMember, ForwardBuffers<E>>::go(calls, count);
}

template <class E>
bool backward(const Backward<E>* calls, int count) {
  return Run<E, Backward<E>, BackwardMember, BackwardBuffers<E>>::go(calls, count);
}

template <class E>
long columns_size(long columns, long depth) {
  return packed_size<E>(plain_panels(columns), depth);
}

template <class E>
void pack_columns(long columns, long depth, const Arithmetic<E>* source, long column_stride, long depth_stride,
                  E* packed, int threads) {
  pack<E>({plain_panels(columns), depth, source, column_stride, depth_stride, packed}, threads);
}

// Below this many multiplications a product is done by the calling thread.
constexpr long worth_sharing = 200000;

template <class E, class Out>
void multiply_rows_by(long rows, long depth, long columns, const E* a, long a_stride, const E* packed, Out* out,
                      long out_stride, int threads) {
  RowProduct<E, Out> it{rows, depth, columns, a, a_stride, packed, out, out_stride};
  it.run(rows * depth * columns < worth_sharing ? 1 : threads);
}

template <class E>
bool add_outer(long rows, long left, long right, const E* a, long a_stride, const E* b, long b_stride,
               Arithmetic<E>* sum, Arithmetic<E>* bias, int threads) {
  OuterProduct<E> it{rows, left, right, a, a_stride, b, b_stride, sum, bias, nullptr};
  if (rows * left * right < worth_sharing) threads = 1;
  it.workspace = static_cast<E*>(scratch_memory(sizeof(E) * threads * it.workspace_size()));
  if (!it.workspace) return false;
  it.run(threads);
  return true;
}

template <class E>
void add_by_id(long rows, long columns, const E* a, long a_stride, const int64_t* ids, Arithmetic<E>* table,
               int threads) {
  RowSums<E> it{rows, columns, a, a_stride, ids, table};
  run_together(rows * columns < worth_sharing ? 1 : threads, RowSums<E>::work, &it);
}

template <class E>
constexpr Kernels<E> kernels{forward_sizes<E>,
                             backward_sizes<E>,
                             pack_forward<E>,
                             pack_backward<E>,
                             forward<E>,
                             backward<E>,
                             columns_size<E>,
                             pack_columns<E>,
                             multiply_rows_by<E, Arithmetic<E>>,
                             multiply_rows_by<E, E>,
                             add_outer<E>,
                             add_by_id<E>};

}  // namespace

#define THROUGHTIME_NAME_OF(name) #name
#define THROUGHTIME_NAME(name) THROUGHTIME_NAME_OF(name)
extern const StreamKernels stream_kernels;
const InstructionSet instruction_set{THROUGHTIME_NAME(THROUGHTIME_ISA), kernels<float>, kernels<double>,
                                      kernels<Bf16>, &variants_f32, &variants_f64, cotangent_norms,
                                      cotangent_norms, &stream_kernels};

}  // namespace throughtime::THROUGHTIME_ISA
