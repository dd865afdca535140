// The minimal gated unit (Zhou et al., 2016), its gates in the order f n: the rows of W_hh for n meet m = f * h, so a step has two
// products. The equations stand in src/throughtime/cells/mgu.py, with the same letters: `a` before a nonlinearity, `d` for a gradient.
#pragma once

#include "../plain.h"
#include "../variant.h"

namespace throughtime::THROUGHTIME_ISA {

// A step and its derivative, on one vector of hidden units; what lies between f and n is two products' business.
template <class T>
struct Mgu {
  using V = Vector<T>;

  static THROUGHTIME_INLINE V mix(V f, V n, V h_prev) { return blend(f, n, h_prev); }

  static THROUGHTIME_INLINE V candidate_backward(V dh, V f, V n) { return dh * f * (T(1) - n * n); }

  // dm: what comes back over the candidate's weights; h_in: h as it met them.
  static THROUGHTIME_INLINE V gate_backward(V dh, V f, V n, V h_prev, V dm, V h_in) {
    return (dh * (n - h_prev) + dm * h_in) * f * (T(1) - f);
  }
};

template <class E, class Cell>
class MguForward : public PlainForward<E, Cell, MguForward<E, Cell>> {
 public:
  using Base = PlainForward<E, Cell, MguForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  void step(long t, long count) {
    const auto& s = this->s_;
    const long H = s.hidden;
    const Rows<E> m = this->buffers_.m;
    const auto rows = this->rows_of(t);
    this->joint_product(count, [=](long row, long first, const T* tile, const T* bias) __attribute__((always_inline)) {
      T* x = rows.x.at(row);
      for (long unit = first; unit < first + 4 * W && unit < H; unit += W) {
        const long n = H - unit;
        const V f = sigmoid<T>(load(tile + unit - first) + (load(x + unit, n) + load(bias + unit - first)));
        store(x + unit, f, n);
        if (rows.gates.first) store(rows.gates.at(row) + unit, f, n);
        store(m.at(row) + unit, f * rows.h_before(row, unit));
      }
    });
    this->meet();
    this->unit_product(H, s.weight_last, this->last_bias(), m, H, count, [=](long row, long unit, V u) __attribute__((always_inline)) {
      const T* x = rows.x.at(row) + unit;
      const long n = H - unit;
      const V candidate = tanh<T>(u + load(x + H, n)), f = load(x, n);
      if (rows.gates.first) store(rows.gates.at(row) + H + unit, candidate, n);
      rows.put_h(row, unit, Mgu<T>::mix(f, candidate, rows.h_before(row, unit)));
    });
  }
};

template <class E, class Cell>
class MguBackward : public PlainBackward<E, Cell, MguBackward<E, Cell>> {
 public:
  using Base = PlainBackward<E, Cell, MguBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step_cell(long t, long count) {
    const long H = this->s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E *gate = this->gates(t, row), *loss = this->own_loss(t, row);
      E *grad = this->grad_ih(t, row), *da_n = this->buffers_.da_last.at(row);
      T* dh = this->dh_.at(row);
      this->each_unit([&](long unit, long n) {
        const V into = this->reaching(row, unit, loss);
        const V a_n = Mgu<T>::candidate_backward(into, load(gate + unit, n), load(gate + H + unit, n));
        store(dh + unit, into);
        store(da_n + unit, a_n, n);
        store(grad + H + unit, a_n, n);
      });
    }
    this->meet();
    this->unit_product(H, this->s_.weight_last, nullptr, this->buffers_.da_last, H, count, [&](long row, long unit, V dm) {
      const long n = H - unit;
      const E* gate = this->gates(t, row) + unit;
      const V f = load(gate, n), h_prev = load(this->h_before(t, row) + unit, n);
      T* dh = this->dh_.at(row) + unit;
      const V into = load(dh), a_f = Mgu<T>::gate_backward(into, f, load(gate + H, n), h_prev, dm, h_prev);
      store(dh, into * (T(1) - f) + dm * f);
      store(this->da_.at(row) + unit, a_f, n);
      store(this->grad_ih(t, row) + unit, a_f, n);
      store(this->extra(t, row) + unit, f * h_prev, n);
    });
    this->through_weights(count, true);
  }
};

template <class E, class Cell>
class MguVariantForward : public VariantForward<E, Cell, MguVariantForward<E, Cell>> {
 public:
  using Base = VariantForward<E, Cell, MguVariantForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step(long t, long count) {
    const long H = this->s_.hidden;
    this->joint_product(t, count);
    this->each_row(t, count, [&](long row, auto in, auto back) {
      E *gate = this->gates(t, row), *m = this->buffers_.m.at(row);
      this->each_unit([&](long unit, long n) {
        const V f = sigmoid<T>(in(0, unit, n) + back(0, unit, n)), in_n = in(1, unit, n);
        store(gate + unit, f, n);
        this->put_in_last(row, unit, in_n);
        store(m + unit, f * this->dropped(row, unit, this->h_before(row, unit)));
      });
    });
    this->last_product(t, count);
    this->each_row_of_last(t, count, [&](long row, auto back) {
      E* gate = this->gates(t, row);
      this->each_unit([&](long unit, long n) {
        const V candidate = tanh<T>(this->in_last(row, unit) + back(0, unit, n));
        store(gate + H + unit, candidate, n);
        this->put_h(t, row, unit, Mgu<T>::mix(load(gate + unit, n), candidate, this->h_before(row, unit)));
      });
    });
  }
};

template <class E, class Cell>
class MguVariantBackward : public VariantBackward<E, Cell, MguVariantBackward<E, Cell>> {
 public:
  using Base = VariantBackward<E, Cell, MguVariantBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step_cell(long t, long count) {
    const long H = this->s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E *gate = this->gates(t, row), *h_prev = this->h_before(t, row);
      T *da = this->da(t, row), *dh = this->dh_.at(row);
      this->each_unit([&](long unit, long n) {
        const V f = load(gate + unit, n), candidate = load(gate + H + unit, n), into = this->reaching(t, row, unit);
        this->put_da(da, 1, unit, Mgu<T>::candidate_backward(into, f, candidate), n);
        // What comes back over n is added to it, and then it goes through f.
        store(da + unit, into * (candidate - load(h_prev + unit, n)), n);
        store(dh + unit, load(dh + unit) + into * (T(1) - f));
      });
    }
    this->through_last(t, count, [&](long row, long unit, V dm) {
      const long n = H - unit;
      const V f = load(this->gates(t, row) + unit, n);
      const V h_in = this->dropped(row, unit, load(this->h_before(t, row) + unit, n));
      T *dh = this->dh_.at(row) + unit, *da = this->da(t, row);
      this->put_da(da, 0, unit, (load(da + unit, n) + dm * h_in) * f * (T(1) - f), n);
      store(dh, load(dh) + this->dropped(row, unit, dm * f));
      store(this->extra(t, row) + unit, f * h_in, n);
    });
    this->through_joint(t, count);
  }
};

// What it is made of, for the element E.
template <class E>
struct MguPage {
  static constexpr Facts facts{"mgu", false, 2, 1, true, false, 0, 0};
  using Forward = MguForward<E, MguPage>;
  using Backward = MguBackward<E, MguPage>;
  using VariantForward = MguVariantForward<E, MguPage>;
  using VariantBackward = MguVariantBackward<E, MguPage>;
};

}  // namespace throughtime::THROUGHTIME_ISA
