// The GRU, its gates in the order r z n, whose reset gate acts after the product with W_hh (torch's and cuDNN's form). The equations
// stand in src/throughtime/cells/gru.py, with the same letters: `a` before a nonlinearity, `d` for a gradient, u for U_n h.
#pragma once

#include "../plain.h"
#include "../variant.h"

namespace throughtime::THROUGHTIME_ISA {

// What both forms share, on one vector of hidden units. They differ in where the reset gate acts, so `a_n` is the caller's.
template <class T>
struct Gru {
  using V = Vector<T>;

  static THROUGHTIME_INLINE V mix(V z, V n, V h_prev) { return blend(z, h_prev, n); }

  struct Gradient {
    V a_z, a_n, h_prev;  // h_prev: the part that goes past the weights
  };

  static THROUGHTIME_INLINE Gradient mix_backward(V dh, V z, V n, V h_prev) {
    Gradient d;
    d.a_n = dh * (T(1) - z) * (T(1) - n * n);
    d.a_z = dh * (h_prev - n) * z * (T(1) - z);
    d.h_prev = dh * z;
    return d;
  }

  static THROUGHTIME_INLINE V sigmoid_backward(V d, V s) { return d * s * (T(1) - s); }
};

template <class E, class Cell>
class GruForward : public PlainForward<E, Cell, GruForward<E, Cell>> {
 public:
  using Base = PlainForward<E, Cell, GruForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  void step(long t, long count) {
    const long H = this->s_.hidden;
    const auto rows = this->rows_of(t);
    this->joint_product(count, [=](long row, long unit, const T* tile, const T* b) __attribute__((always_inline)) {
      const T* x = rows.x.at(row) + unit;
      const long n = H - unit;
      const V r = sigmoid<T>(load(tile) + (load(x, n) + load(b)));
      const V z = sigmoid<T>(load(tile + W) + (load(x + H, n) + load(b + W)));
      const V u = load(tile + 2 * W);
      const V candidate = tanh<T>(load(x + 2 * H, n) + load(b + 2 * W) + r * u);
      if (rows.kept.first) {
        E* gate = rows.gates.at(row) + unit;
        store(gate, r, n);
        store(gate + H, z, n);
        store(gate + 2 * H, candidate, n);
        store(rows.kept.at(row) + unit, u, n);
      }
      rows.put_h(row, unit, Gru<T>::mix(z, candidate, rows.h_before(row, unit)));
    });
  }
};

template <class E, class Cell>
class GruBackward : public PlainBackward<E, Cell, GruBackward<E, Cell>> {
 public:
  using Base = PlainBackward<E, Cell, GruBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step_cell(long t, long count) {
    const long H = this->s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E *gate = this->gates(t, row), *h_prev = this->h_before(t, row), *u = this->kept(t, row);
      const E* loss = this->own_loss(t, row);
      E *grad = this->grad_ih(t, row), *da = this->da_.at(row);
      T* dh = this->dh_.at(row);
      this->each_unit([&](long unit, long n) {
        const V r = load(gate + unit, n);
        const auto d = Gru<T>::mix_backward(this->reaching(row, unit, loss), load(gate + H + unit, n),
                                            load(gate + 2 * H + unit, n), load(h_prev + unit, n));
        const V a_r = Gru<T>::sigmoid_backward(d.a_n * load(u + unit, n), r);
        const V du = d.a_n * r;
        store(dh + unit, d.h_prev);
        store(da + unit, a_r, n);
        store(da + H + unit, d.a_z, n);
        store(da + 2 * H + unit, du, n);
        store(grad + unit, d.a_n, n);  // n r z for W_ih, r z u for W_hh
        store(grad + H + unit, a_r, n);
        store(grad + 2 * H + unit, d.a_z, n);
        store(grad + 3 * H + unit, du, n);
      });
    }
    this->through_weights(count, true);
  }
};

template <class E, class Cell>
class GruVariantForward : public VariantForward<E, Cell, GruVariantForward<E, Cell>> {
 public:
  using Base = VariantForward<E, Cell, GruVariantForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step(long t, long count) {
    const long H = this->s_.hidden;
    this->joint_product(t, count);
    this->each_row(t, count, [&](long row, auto in, auto back) {
      E* gate = this->gates(t, row);
      this->each_unit([&](long unit, long n) {
        const V r = sigmoid<T>(in(0, unit, n) + back(0, unit, n)), z = sigmoid<T>(in(1, unit, n) + back(1, unit, n));
        const V u_n = back(2, unit, n), candidate = tanh<T>(in(2, unit, n) + r * u_n);
        store(gate + unit, r, n);
        store(gate + H + unit, z, n);
        store(gate + 2 * H + unit, candidate, n);
        if (this->s_.kept) store(this->kept(t, row) + unit, u_n, n);
        this->put_h(t, row, unit, Gru<T>::mix(z, candidate, this->h_before(row, unit)));
      });
    });
  }
};

template <class E, class Cell>
class GruVariantBackward : public VariantBackward<E, Cell, GruVariantBackward<E, Cell>> {
 public:
  using Base = VariantBackward<E, Cell, GruVariantBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step_cell(long t, long count) {
    const long H = this->s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E *gate = this->gates(t, row), *h_prev = this->h_before(t, row), *u_n = this->kept(t, row);
      T *d_ih = this->da(t, row), *d_hh = this->da_hh(t, row), *dh = this->dh_.at(row);
      this->each_unit([&](long unit, long n) {
        const V r = load(gate + unit, n), into = this->reaching(t, row, unit);
        const auto d = Gru<T>::mix_backward(into, load(gate + H + unit, n), load(gate + 2 * H + unit, n),
                                            load(h_prev + unit, n));
        const V a_r = Gru<T>::sigmoid_backward(d.a_n * load(u_n + unit, n), r), du_n = d.a_n * r;
        store(dh + unit, load(dh + unit) + d.h_prev);
        this->put_da(d_ih, 0, unit, a_r, n);
        this->put_da(d_ih, 1, unit, d.a_z, n);
        this->put_da(d_ih, 2, unit, d.a_n, n);
        this->add(3, unit, du_n);
        store(d_hh + unit, a_r, n);
        store(d_hh + H + unit, d.a_z, n);
        store(d_hh + 2 * H + unit, du_n, n);
      });
    }
    this->through_joint(t, count);
  }
};

// What it is made of, for the element E.
template <class E>
struct GruPage {
  static constexpr Facts facts{"gru", false, 3, 3, true, true, 2, 1};
  using Forward = GruForward<E, GruPage>;
  using Backward = GruBackward<E, GruPage>;
  using VariantForward = GruVariantForward<E, GruPage>;
  using VariantBackward = GruVariantBackward<E, GruPage>;
};

}  // namespace throughtime::THROUGHTIME_ISA
