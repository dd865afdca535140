// The GRU of Cho et al. (2014), whose reset gate acts before the product: the rows of W_hh for n meet m = r * h, so a step has two
// products, and a second meeting between them. The equations stand in src/throughtime/cells/gru.py, with the same letters.
#pragma once

#include "gru.h"

namespace throughtime::THROUGHTIME_ISA {

template <class E, class Cell>
class GruResetBeforeForward : public PlainForward<E, Cell, GruResetBeforeForward<E, Cell>> {
 public:
  using Base = PlainForward<E, Cell, GruResetBeforeForward>;
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
      for (long u = 0; u < 2 && first + u * W < H; ++u) {
        const long unit = first + u * W, n = H - unit;
        T* x = rows.x.at(row) + unit;
        const T* b = bias + u * 2 * W;
        const V r = sigmoid<T>(load(tile + 2 * u * W) + (load(x, n) + load(b)));
        const V z = sigmoid<T>(load(tile + (2 * u + 1) * W) + (load(x + H, n) + load(b + W)));
        store(x + H, z, n);
        if (rows.gates.first) {
          E* gate = rows.gates.at(row) + unit;
          store(gate, r, n);
          store(gate + H, z, n);
        }
        store(m.at(row) + unit, r * rows.h_before(row, unit));
      }
    });
    this->meet();
    this->unit_product(H, s.weight_last, this->last_bias(), m, H, count, [=](long row, long unit, V u) __attribute__((always_inline)) {
      const T* x = rows.x.at(row) + unit;
      const long n = H - unit;
      const V candidate = tanh<T>(u + load(x + 2 * H, n)), z = load(x + H, n);
      if (rows.gates.first) store(rows.gates.at(row) + 2 * H + unit, candidate, n);
      rows.put_h(row, unit, Gru<T>::mix(z, candidate, rows.h_before(row, unit)));
    });
  }
};

template <class E, class Cell>
class GruResetBeforeBackward : public PlainBackward<E, Cell, GruResetBeforeBackward<E, Cell>> {
 public:
  using Base = PlainBackward<E, Cell, GruResetBeforeBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step_cell(long t, long count) {
    const long H = this->s_.hidden;
    for (long row = 0; row < count; ++row) {
      const E *gate = this->gates(t, row), *h_prev = this->h_before(t, row), *loss = this->own_loss(t, row);
      E *grad = this->grad_ih(t, row), *da = this->da_.at(row), *da_n = this->buffers_.da_last.at(row);
      T* dh = this->dh_.at(row);
      this->each_unit([&](long unit, long n) {
        const auto d = Gru<T>::mix_backward(this->reaching(row, unit, loss), load(gate + H + unit, n),
                                            load(gate + 2 * H + unit, n), load(h_prev + unit, n));
        store(dh + unit, d.h_prev);
        store(da_n + unit, d.a_n, n);
        store(da + H + unit, d.a_z, n);
        store(grad + H + unit, d.a_z, n);
        store(grad + 2 * H + unit, d.a_n, n);
      });
    }
    this->meet();
    this->unit_product(H, this->s_.weight_last, nullptr, this->buffers_.da_last, H, count, [&](long row, long unit, V dm) {
      const long n = H - unit;
      const V r = load(this->gates(t, row) + unit, n), h_prev = load(this->h_before(t, row) + unit, n);
      const V a_r = Gru<T>::sigmoid_backward(dm * h_prev, r);
      T* dh = this->dh_.at(row) + unit;
      store(dh, load(dh) + dm * r);
      store(this->da_.at(row) + unit, a_r, n);
      store(this->grad_ih(t, row) + unit, a_r, n);
      store(this->extra(t, row) + unit, r * h_prev, n);
    });
    this->through_weights(count, true);
  }
};

template <class E, class Cell>
class GruResetBeforeVariantForward : public VariantForward<E, Cell, GruResetBeforeVariantForward<E, Cell>> {
 public:
  using Base = VariantForward<E, Cell, GruResetBeforeVariantForward>;
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
        const V r = sigmoid<T>(in(0, unit, n) + back(0, unit, n)), z = sigmoid<T>(in(1, unit, n) + back(1, unit, n));
        const V in_n = in(2, unit, n);  // before `gates` takes the place of x
        store(gate + unit, r, n);
        store(gate + H + unit, z, n);
        this->put_in_last(row, unit, in_n);
        store(m + unit, r * this->dropped(row, unit, this->h_before(row, unit)));
      });
    });
    this->last_product(t, count);
    this->each_row_of_last(t, count, [&](long row, auto back) {
      E* gate = this->gates(t, row);
      this->each_unit([&](long unit, long n) {
        const V candidate = tanh<T>(this->in_last(row, unit) + back(0, unit, n));
        store(gate + 2 * H + unit, candidate, n);
        this->put_h(t, row, unit, Gru<T>::mix(load(gate + H + unit, n), candidate, this->h_before(row, unit)));
      });
    });
  }
};

template <class E, class Cell>
class GruResetBeforeVariantBackward : public VariantBackward<E, Cell, GruResetBeforeVariantBackward<E, Cell>> {
 public:
  using Base = VariantBackward<E, Cell, GruResetBeforeVariantBackward>;
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
        const auto d = Gru<T>::mix_backward(this->reaching(t, row, unit), load(gate + H + unit, n),
                                            load(gate + 2 * H + unit, n), load(h_prev + unit, n));
        store(dh + unit, load(dh + unit) + d.h_prev);
        this->put_da(da, 1, unit, d.a_z, n);
        this->put_da(da, 2, unit, d.a_n, n);
      });
    }
    this->through_last(t, count, [&](long row, long unit, V dm) {
      const long n = H - unit;
      const V r = load(this->gates(t, row) + unit, n);
      const V h_in = this->dropped(row, unit, load(this->h_before(t, row) + unit, n));
      T* dh = this->dh_.at(row) + unit;
      this->put_da(this->da(t, row), 0, unit, Gru<T>::sigmoid_backward(dm * h_in, r), n);
      store(dh, load(dh) + this->dropped(row, unit, dm * r));
      store(this->extra(t, row) + unit, r * h_in, n);
    });
    this->through_joint(t, count);
  }
};

// What it is made of, for the element E.
template <class E>
struct GruResetBeforePage {
  static constexpr Facts facts{"gru_reset_before", false, 3, 2, true, false, 0, 0};
  using Forward = GruResetBeforeForward<E, GruResetBeforePage>;
  using Backward = GruResetBeforeBackward<E, GruResetBeforePage>;
  using VariantForward = GruResetBeforeVariantForward<E, GruResetBeforePage>;
  using VariantBackward = GruResetBeforeVariantBackward<E, GruResetBeforePage>;
};

}  // namespace throughtime::THROUGHTIME_ISA
