// The LSTM, its gates in the order i f g o; coupled, f g o and i = 1 - f. The equations stand in src/throughtime/cells/lstm.py, with the
// same letters: `a` before a nonlinearity, `d` for a gradient, m for what a projection maps to h.
#pragma once

#include "../plain.h"
#include "../variant.h"

namespace throughtime::THROUGHTIME_ISA {

// A step and its derivative, on one vector of hidden units.
template <class T>
struct Lstm {
  using V = Vector<T>;

  struct Step {
    V i, f, g, o, c, m;
  };

  static THROUGHTIME_INLINE Step step(V a_i, V a_f, V a_g, V a_o, V c_prev) {
    Step s;
    s.i = sigmoid<T>(a_i);
    s.f = sigmoid<T>(a_f);
    s.g = tanh<T>(a_g);
    s.o = sigmoid<T>(a_o);
    s.c = next_c(s.f, c_prev, s.i, s.g);
    s.m = s.o * tanh<T>(s.c);
    return s;
  }

  struct Gradient {
    V a_i, a_f, a_g, a_o, c_prev, m;  // m is no gradient: the step's value again, for the projection's weights
  };

  static THROUGHTIME_INLINE Gradient step_backward(V dm, V dc, V i, V f, V g, V o, V c, V c_prev) {
    const V tanh_c = tanh<T>(c);
    dc += dm * o * (T(1) - tanh_c * tanh_c);
    Gradient d;
    d.a_i = dc * g * i * (T(1) - i);
    d.a_f = dc * c_prev * f * (T(1) - f);
    d.a_g = dc * i * (T(1) - g * g);
    d.a_o = dm * tanh_c * o * (T(1) - o);
    d.c_prev = dc * f;
    d.m = o * tanh_c;
    return d;
  }

  // Fused alike wherever it stands: with zoneout both passes compute it, and the backward pass must not meet another c than the forward
  // pass has normalised. Of a single unit c − mean is exactly zero, and what isn't grows by 1/√ε.
  static THROUGHTIME_INLINE V next_c(V f, V c_prev, V i, V g) {
    V added = i * g;
    hold(added);
    return f * c_prev + added;
  }
};

template <class E, class Cell>
class LstmForward : public PlainForward<E, Cell, LstmForward<E, Cell>> {
 public:
  using Base = PlainForward<E, Cell, LstmForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  void step(long t, long count) {
    const auto& s = this->s_;
    const long H = s.hidden;
    const auto rows = this->rows_of(t);
    const Rows<T> c_rows = this->buffers_.c;
    const Rows<E> m = s.projected ? this->buffers_.m : Rows<E>{};
    this->joint_product(count, [=](long row, long unit, const T* tile, const T* b) __attribute__((always_inline)) {
      const T* x = rows.x.at(row) + unit;
      T* c = c_rows.at(row) + unit;
      const long n = H - unit;
      const auto it = Lstm<T>::step(load(tile) + (load(x, n) + load(b)), load(tile + W) + (load(x + H, n) + load(b + W)),
                                    load(tile + 2 * W) + (load(x + 2 * H, n) + load(b + 2 * W)),
                                    load(tile + 3 * W) + (load(x + 3 * H, n) + load(b + 3 * W)), load(c));
      store(c, it.c);
      if (rows.kept.first) {
        E* gate = rows.gates.at(row) + unit;
        store(gate, it.i, n);
        store(gate + H, it.f, n);
        store(gate + 2 * H, it.g, n);
        store(gate + 3 * H, it.o, n);
        store(rows.kept.at(row) + unit, it.c, n);
      }
      if (m.data)
        store(m.at(row) + unit, it.m);
      else
        rows.put_h(row, unit, it.m);
    });
    if (!s.projected) return;
    this->meet();
    this->unit_product(s.projected, s.weight_hr, nullptr, m, H, count,
                       [=](long row, long unit, V h) __attribute__((always_inline)) { rows.put_h(row, unit, h); });
  }
};

template <class E, class Cell>
class LstmBackward : public PlainBackward<E, Cell, LstmBackward<E, Cell>> {
 public:
  using Base = PlainBackward<E, Cell, LstmBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  void step_cell(long t, long count) {
    const auto& s = this->s_;
    if (s.projected) {
      const Rows<E> projected_dh = this->buffers_.projected_dh;
      for (long row = 0; row < count; ++row)
        for (long unit = this->own_h_.begin; unit < this->own_h_.end; unit += W) {
          const V dh = this->reaching(row, unit, this->own_loss(t, row));
          store(projected_dh.at(row) + unit, dh);
          store(s.grad_hidden + this->grad_row(t, row) * s.projected + unit, dh, s.projected - unit);
        }
      this->meet();
      this->unit_product(s.hidden, s.weight_hr, nullptr, projected_dh, s.projected, count,
                         [&](long row, long unit, V dm) { step_unit(row_at(t, row), unit, dm); });
    } else {
      for (long row = 0; row < count; ++row) {
        const E* loss = this->own_loss(t, row);
        const Row at = row_at(t, row);
        this->each_unit([&](long unit, long) __attribute__((always_inline)) {
          step_unit(at, unit, this->reaching(row, unit, loss));
        });
      }
    }
    this->through_weights(count, false);
  }

  // A row's arrays in a step.
  struct Row {
    const E *gates, *c, *c_before;
    E *grad, *da, *m;  // m is null without a projection
    T* dc;
    long hidden;
  };

  Row row_at(long t, long row) const {
    return {this->gates(t, row),   this->kept(t, row),    this->c_before(t, row),
            this->grad_ih(t, row), this->da_.at(row),     this->s_.projected ? this->extra(t, row) : nullptr,
            this->dc_.at(row),     this->s_.hidden};
  }

  static THROUGHTIME_INLINE void step_unit(const Row& at, long unit, V dm) {
    const long H = at.hidden, n = H - unit;
    const E* gate = at.gates + unit;
    const auto d = Lstm<T>::step_backward(dm, load(at.dc + unit), load(gate, n), load(gate + H, n), load(gate + 2 * H, n),
                                          load(gate + 3 * H, n), load(at.c + unit, n), load(at.c_before + unit, n));
    store(at.dc + unit, d.c_prev);
    const V parts[] = {d.a_i, d.a_f, d.a_g, d.a_o};
    for (int g = 0; g < 4; ++g) {
      store(at.da + g * H + unit, parts[g], n);
      store(at.grad + g * H + unit, parts[g], n);
    }
    if (at.m) store(at.m + unit, d.m, n);
  }
};

template <class E, class Cell>
class LstmVariantForward : public VariantForward<E, Cell, LstmVariantForward<E, Cell>> {
 public:
  using Base = VariantForward<E, Cell, LstmVariantForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  bool is_coupled() const { return this->s_.gate_count < 4; }

  void step(long t, long count) {
    this->joint_product(t, count);
    this->each_row(t, count, [&](long row, auto in, auto back) { step_row(t, row, in, back); });
    if (this->is_normalised()) put_normalised(t, count);
    const auto& s = this->s_;
    if (!s.projected) return;
    this->meet();
    this->unit_product(s.projected, s.weight_hr, nullptr, this->buffers_.m, s.hidden, count,
                       [&](long row, long unit, V h) { this->put_h(t, row, unit, h); });
  }

  template <class In, class Back>
  void step_row(long t, long row, In in, Back back) {
    const long H = this->s_.hidden;
    const T* weight_ch = this->v_.weight_ch;
    E* gate = this->gates(t, row);
    const int f_row = is_coupled() ? 0 : 1;
    T *c_row = this->buffers_.c.at(row), *new_c = this->buffers_.new_c.at(row);
    this->each_unit([&](long unit, long n) {
      const auto a = [&](int g) { return in(g, unit, n) + back(g, unit, n); };
      const auto peephole = [&](int g, V c) { return weight_ch ? load(weight_ch + g * H + unit, n) * c : V{}; };
      const V c_prev = load(c_row + unit);
      const V f = sigmoid<T>(a(f_row) + peephole(f_row, c_prev)), g = tanh<T>(a(f_row + 1));
      const V i = is_coupled() ? T(1) - f : sigmoid<T>(a(0) + peephole(0, c_prev));
      const V c = Lstm<T>::next_c(f, c_prev, i, g);
      const V o = sigmoid<T>(a(f_row + 2) + peephole(f_row + 1, c));
      if (!is_coupled()) store(gate + unit, i, n);
      store(gate + f_row * H + unit, f, n);
      store(gate + (f_row + 1) * H + unit, g, n);
      store(gate + (f_row + 2) * H + unit, o, n);
      store(new_c + unit, c);
      if constexpr (is_narrow<E>)
        if (this->s_.norms) store(this->buffers_.saved_c.at(row) + unit, saved_c(c, f, c_prev, i, g));
      V after = c;
      if (this->zones_c()) {
        const V keep = this->mask_c(t, row, unit);
        after = blend(keep, c_prev, c);
      }
      store(c_row + unit, after);
      if (this->s_.kept) store(this->kept(t, row) + unit, after, n);
      if (!this->is_normalised()) put_m(t, row, unit, o * tanh<T>(c));
    });
  }

  // c_t as the backward pass meets it, which has rounded numbers only: see its `new_c`.
  V saved_c(V c, V f, V c_prev, V i, V g) const {
    if (!this->zones_c()) return Base::rounded(c);
    f = Base::rounded(f);
    return Lstm<T>::next_c(f, Base::rounded(c_prev), is_coupled() ? T(1) - f : Base::rounded(i), Base::rounded(g));
  }

  // The norm kept is that of the c that the backward pass meets: standardised by another's, a row has neither mean zero nor variance
  // one, and what its gradient keeps of that grows by 1/√ε.
  Norm<T> take_norm_of_c(long t, long row) const {
    const long H = this->s_.hidden;
    const T* c = this->buffers_.new_c.at(row);
    if constexpr (!is_narrow<E>) return this->take_norm(c, H, t, row, 2);
    if (this->keeps_norms()) this->keep_norm(norm_of<T>(this->buffers_.saved_c.at(row), H), t, row, 2);
    return norm_of<T>(c, H);
  }

  void put_normalised(long t, long count) {
    const long H = this->s_.hidden;
    this->meet();
    for (long row = 0; row < count; ++row) {
      const T* c = this->buffers_.new_c.at(row);
      const E* o = this->gates(t, row) + (is_coupled() ? 2 : 3) * H;
      const Norm<T> of_c = take_norm_of_c(t, row);
      this->each_unit([&](long unit, long n) {
        const V normal = normalised<T>(load(c + unit), of_c, load(this->v_.gain_c + unit, n), load(this->v_.shift_c + unit, n));
        put_m(t, row, unit, load(o + unit, n) * tanh<T>(normal));
      });
    }
  }

  void put_m(long t, long row, long unit, V m) {
    if (this->s_.projected)
      store(this->buffers_.m.at(row) + unit, m);
    else
      this->put_h(t, row, unit, m);
  }
};

template <class E, class Cell>
class LstmVariantBackward : public VariantBackward<E, Cell, LstmVariantBackward<E, Cell>> {
 public:
  using Base = VariantBackward<E, Cell, LstmVariantBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  bool is_coupled() const { return this->s_.gate_count < 4; }

  void step_cell(long t, long count) {
    const auto& s = this->s_;
    if (s.projected) {
      const Rows<E> projected_dh = this->rows_at(s.grad_hidden, s.projected, t);
      for (long row = 0; row < count; ++row)
        for (long unit = this->own_h_.begin; unit < this->own_h_.end; unit += W)
          store(s.grad_hidden + this->grad_row(t, row) * s.projected + unit, this->reaching(t, row, unit), s.projected - unit);
      this->meet();
      this->unit_product(s.hidden, s.weight_hr, nullptr, projected_dh, s.projected, count,
                         [&](long row, long unit, V dm) { step_output(t, row, unit, dm); });
    } else {
      for (long row = 0; row < count; ++row)
        this->each_unit([&](long unit, long) { step_output(t, row, unit, this->reaching(t, row, unit)); });
    }
    if (this->is_normalised()) this->meet();
    for (long row = 0; row < count; ++row) step_gates(t, row);
    this->through_joint(t, count);
  }

  // c_t before zoneout.
  V new_c(long t, long row, long unit, long n) const {
    const long H = this->s_.hidden;
    if (!this->zones_c()) return load(this->kept(t, row) + unit, n);
    const E* gate = this->gates(t, row) + unit;
    if (!is_coupled()) gate += H;
    const V f = load(gate, n), g = load(gate + H, n), i = is_coupled() ? T(1) - f : load(gate - H, n);
    return Lstm<T>::next_c(f, load(this->c_before(t, row) + unit, n), i, g);
  }

  // dm back over o and tanh: to a_o, and to n_t, which is c_t where it isn't normalised.
  void step_output(long t, long row, long unit, V dm) {
    const long H = this->s_.hidden, n = H - unit, o_row = is_coupled() ? 2 : 3;
    V normal = new_c(t, row, unit, n);
    T* standard_c = this->buffers_.standard_c.at(row) + unit;
    if (this->is_normalised()) {
      const Norm<T> of_c = this->norm(t, row, 2);
      store(standard_c, only<T>(of_c.standard(normal), n));
      normal = normalised<T>(normal, of_c, load(this->v_.gain_c + unit, n), load(this->v_.shift_c + unit, n));
    }
    const V o = load(this->gates(t, row) + o_row * H + unit, n), tanh_n = tanh<T>(normal);
    const V dn = dm * o * (T(1) - tanh_n * tanh_n);
    if (this->is_normalised()) {
      this->add(this->at_gain_c(), unit, dn * load(standard_c));
      this->add(this->at_gain_c() + 1, unit, dn);
    }
    store(this->buffers_.dn.at(row) + unit, dn);
    store(this->da(t, row) + o_row * H + unit, dm * tanh_n * o * (T(1) - o), n);
    if (this->s_.projected) store(this->extra(t, row) + unit, o * tanh_n, n);
  }

  void step_gates(long t, long row) {
    const long H = this->s_.hidden, f_row = is_coupled() ? 0 : 1;
    const E *gate = this->gates(t, row), *c_prev_row = this->c_before(t, row);
    const T *dn_row = this->buffers_.dn.at(row), *standard_row = this->buffers_.standard_c.at(row);
    const T *gain_c = this->v_.gain_c, *weight_ch = this->v_.weight_ch;
    Norm<T> of_c{};
    Moments<T> m{};
    if (this->is_normalised()) {
      of_c = this->norm(t, row, 2);
      m = moments_of<T>(dn_row, gain_c, standard_row, Norm<T>{T(0), T(1)}, H);
    }
    T *d = this->da(t, row), *dc_row = this->dc_.at(row);
    this->each_unit([&](long unit, long n) {
      const V f = load(gate + f_row * H + unit, n), g = load(gate + (f_row + 1) * H + unit, n);
      const V i = is_coupled() ? T(1) - f : load(gate + unit, n);
      const V c_prev = load(c_prev_row + unit, n), d_o = load(d + (f_row + 2) * H + unit, n);
      V dc = load(dc_row + unit), kept_dc{}, dn = load(dn_row + unit);
      if (this->zones_c()) {
        const V keep = this->mask_c(t, row, unit);
        kept_dc = keep * dc;
        dc = (T(1) - keep) * dc;
      }
      if (this->is_normalised()) dn = normalise_backward<T>(dn, load(gain_c + unit, n), load(standard_row + unit), of_c, m);
      dc += dn;
      if (weight_ch) {
        dc += d_o * load(weight_ch + (f_row + 1) * H + unit, n);
        this->add(this->at_weight_ch() + f_row + 1, unit, d_o * new_c(t, row, unit, n));
      }
      const V d_f = dc * (is_coupled() ? c_prev - g : c_prev) * f * (T(1) - f), d_g = dc * i * (T(1) - g * g);
      V before = dc * f + kept_dc;
      if (!is_coupled()) {
        const V d_i = dc * g * i * (T(1) - i);
        this->put_da(d, 0, unit, d_i, n);
        if (weight_ch) before += through_peephole(0, unit, d_i, c_prev, n);
      }
      if (weight_ch) before += through_peephole(f_row, unit, d_f, c_prev, n);
      this->put_da(d, f_row, unit, d_f, n);
      this->put_da(d, f_row + 1, unit, d_g, n);
      this->add(f_row + 2, unit, d_o);
      store(dc_row + unit, before);
    });
  }

  V through_peephole(long g, long unit, V d, V c_prev, long n) {
    this->add(this->at_weight_ch() + g, unit, d * c_prev);
    return d * load(this->v_.weight_ch + g * this->s_.hidden + unit, n);
  }
};

// What it is made of, for the element E.
template <class E>
struct LstmPage {
  static constexpr Facts facts{"lstm", true, 4, 4, true, true, 0, 0};
  using Forward = LstmForward<E, LstmPage>;
  using Backward = LstmBackward<E, LstmPage>;
  using VariantForward = LstmVariantForward<E, LstmPage>;
  using VariantBackward = LstmVariantBackward<E, LstmPage>;
};

}  // namespace throughtime::THROUGHTIME_ISA
