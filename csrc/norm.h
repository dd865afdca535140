// Layer normalisation of a row, and its derivative.
#pragma once

#include "vector.h"

namespace throughtime::THROUGHTIME_ISA {

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
inline T sum_of_lanes(Vector<T> v) {
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
inline Vector<T> only(Vector<T> v, long count) {
  if (count >= lanes<T>) return v;
  T lane[lanes<T>] = {};
  store(lane, v, count);
  return load(lane);
}

// Not inlined, so that whoever calls it gets the same bits: inlined, a compiler fuses products and sums as the caller has them.
template <class T, class From>
__attribute__((noinline)) Norm<T> norm_of(const From* row, long count) {
  constexpr T epsilon = T(1e-5);
  const T mean = sum_over<T>(count, [&](long j, long n) { return load(row + j, n); }) / T(count);
  const T variance = sum_over<T>(count, [&](long j, long n) {
    const Vector<T> off = only<T>(load(row + j, n) - mean, n);
    return off * off;
  }) / T(count);
  return {mean, T(1) / square_root(variance + epsilon)};
}

// Rounded before the shift is added: whether a compiler fuses the two would else depend on what stands around, and every loop
// that normalises is to have the same bits.
template <class T>
THROUGHTIME_INLINE Vector<T> normalised(Vector<T> u, Norm<T> norm, Vector<T> gain, Vector<T> shift) {
  Vector<T> scaled = norm.standard(u) * gain;
  hold(scaled);
  return scaled + shift;
}

// What a normalisation's backward needs of a row: the means of the standardised row's gradient, and of its product with it.
template <class T>
struct Moments {
  T plain, with_standard;
};

template <class T, class From>
Moments<T> moments_of(const T* grad, const T* gain, const From* row, Norm<T> norm, long count) {
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

}  // namespace throughtime::THROUGHTIME_ISA
