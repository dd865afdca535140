// One step of each cell and its derivative, on one vector of hidden units. The equations stand in
// src/throughtime/cells/{rnn,lstm,gru}.py, with the same letters: `a` before a nonlinearity, `d` for a gradient.
#pragma once

#include "vector.h"

namespace throughtime::THROUGHTIME_ISA {

template <class T>
struct Rnn {
  using V = Vector<T>;

  static THROUGHTIME_INLINE V step(V a, bool relu) { return relu ? (a < T(0) ? V{} : a) : tanh<T>(a); }

  static THROUGHTIME_INLINE V step_backward(V dh, V h, bool relu) {
    return relu ? (h > T(0) ? dh : V{}) : dh * (T(1) - h * h);
  }
};

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
    s.c = s.f * c_prev + s.i * s.g;
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
};

// Both forms: they differ in where the reset gate acts, so `a_n` is the caller's.
template <class T>
struct Gru {
  using V = Vector<T>;

  static THROUGHTIME_INLINE V mix(V z, V n, V h_prev) { return (T(1) - z) * n + z * h_prev; }

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

}  // namespace throughtime::THROUGHTIME_ISA
