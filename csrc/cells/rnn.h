// The plain recurrent network, with tanh or relu. The equations stand in src/throughtime/cells/rnn.py, with the same letters: `a` before
// a nonlinearity, `d` for a gradient.
#pragma once

#include "../plain.h"
#include "../variant.h"

namespace throughtime::THROUGHTIME_ISA {

// A step and its derivative, on one vector of hidden units.
template <class T>
struct Rnn {
  using V = Vector<T>;

  static THROUGHTIME_INLINE V step(V a, bool relu) { return relu ? (a < T(0) ? V{} : a) : tanh<T>(a); }

  static THROUGHTIME_INLINE V step_backward(V dh, V h, bool relu) {
    return relu ? (h > T(0) ? dh : V{}) : dh * (T(1) - h * h);
  }
};

template <class E, class Cell>
class RnnForward : public PlainForward<E, Cell, RnnForward<E, Cell>> {
 public:
  using Base = PlainForward<E, Cell, RnnForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;
  static constexpr long W = Base::W;

  void step(long t, long count) {
    const long H = this->s_.hidden;
    const auto rows = this->rows_of(t);
    this->joint_product(count, [=](long row, long first, const T* tile, const T* bias) __attribute__((always_inline)) {
      const T* x = rows.x.at(row);
      for (long unit = first; unit < first + 4 * W && unit < H; unit += W) {
        const V a = load(tile + unit - first) + (load(x + unit, H - unit) + load(bias + unit - first));
        rows.put_h(row, unit, Rnn<T>::step(a, Cell::relu));
      }
    });
  }
};

template <class E, class Cell>
class RnnBackward : public PlainBackward<E, Cell, RnnBackward<E, Cell>> {
 public:
  using Base = PlainBackward<E, Cell, RnnBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using V = typename Base::V;
  using T = typename Base::T;

  void step_cell(long t, long count) {
    const auto& s = this->s_;
    for (long row = 0; row < count; ++row) {
      const E* h = s.output + this->output_row(t, row) * s.output_stride;
      const E* loss = this->own_loss(t, row);
      E *grad = this->grad_ih(t, row), *da_row = this->da_.at(row);
      this->each_unit([&](long unit, long n) {
        const V da = Rnn<T>::step_backward(this->reaching(row, unit, loss), load(h + unit, n), Cell::relu);
        store(da_row + unit, da, n);
        store(grad + unit, da, n);
      });
    }
    this->through_weights(count, false);
  }
};

template <class E, class Cell>
class RnnVariantForward : public VariantForward<E, Cell, RnnVariantForward<E, Cell>> {
 public:
  using Base = VariantForward<E, Cell, RnnVariantForward>;
  using Base::Base;

 private:
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step(long t, long count) {
    this->joint_product(t, count);
    this->each_row(t, count, [&](long row, auto in, auto back) {
      this->each_unit([&](long unit, long n) {
        const V h = Rnn<T>::step(in(0, unit, n) + back(0, unit, n), Cell::relu);
        store(this->gates(t, row) + unit, h, n);
        this->put_h(t, row, unit, h);
      });
    });
  }
};

template <class E, class Cell>
class RnnVariantBackward : public VariantBackward<E, Cell, RnnVariantBackward<E, Cell>> {
 public:
  using Base = VariantBackward<E, Cell, RnnVariantBackward>;
  using Base::Base;

 private:
  friend Base;
  friend typename Base::Loop;
  using T = typename Base::T;
  using V = typename Base::V;

  void step_cell(long t, long count) {
    for (long row = 0; row < count; ++row) {
      T* da = this->da(t, row);
      this->each_unit([&](long unit, long n) {
        this->put_da(da, 0, unit,
                     Rnn<T>::step_backward(this->reaching(t, row, unit), load(this->gates(t, row) + unit, n), Cell::relu), n);
      });
    }
    this->through_joint(t, count);
  }
};

// What it is made of, for the element E.
template <class E, bool is_relu>
struct RnnPage {
  static constexpr bool relu = is_relu;
  // The output is all that its derivative needs.
  static constexpr Facts facts{is_relu ? "rnn_relu" : "rnn_tanh", false, 1, 1, false, false, 0, 0};
  using Forward = RnnForward<E, RnnPage>;
  using Backward = RnnBackward<E, RnnPage>;
  using VariantForward = RnnVariantForward<E, RnnPage>;
  using VariantBackward = RnnVariantBackward<E, RnnPage>;
};
template <class E>
using RnnTanhPage = RnnPage<E, false>;
template <class E>
using RnnReluPage = RnnPage<E, true>;

}  // namespace throughtime::THROUGHTIME_ISA
