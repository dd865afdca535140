// Squares of a matrix that lies row after row, turned in registers: a lane of the results for each row. So a product's columns, which are
// rows of the weights as torch has them, are read without packing them first, or packed.
#pragma once

#include "vector.h"

namespace throughtime::THROUGHTIME_ISA {

#if defined(__AVX512F__)
using Register = __m512;
THROUGHTIME_INLINE Register low_words(Register a, Register b) { return _mm512_unpacklo_ps(a, b); }
THROUGHTIME_INLINE Register high_words(Register a, Register b) { return _mm512_unpackhi_ps(a, b); }
THROUGHTIME_INLINE Register low_pairs(Register a, Register b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
THROUGHTIME_INLINE Register high_pairs(Register a, Register b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
// Of four registers, `stride` from each other: quarter j of each, to the j-th.
THROUGHTIME_INLINE void turn_quarters(const Register* from, Register* to, long stride) {
  const Register a = from[0], b = from[stride], c = from[2 * stride], d = from[3 * stride];
  const Register ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
  const Register ab_high = _mm512_shuffle_f32x4(a, b, 0xEE), cd_high = _mm512_shuffle_f32x4(c, d, 0xEE);
  to[0] = _mm512_shuffle_f32x4(ab, cd, 0x88);
  to[stride] = _mm512_shuffle_f32x4(ab, cd, 0xDD);
  to[2 * stride] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
  to[3 * stride] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xDD);
}
#elif defined(__AVX2__)
using Register = __m256;
THROUGHTIME_INLINE Register low_words(Register a, Register b) { return _mm256_unpacklo_ps(a, b); }
THROUGHTIME_INLINE Register high_words(Register a, Register b) { return _mm256_unpackhi_ps(a, b); }
THROUGHTIME_INLINE Register low_pairs(Register a, Register b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
THROUGHTIME_INLINE Register high_pairs(Register a, Register b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
THROUGHTIME_INLINE void turn_quarters(const Register* from, Register* to, long stride) {
  to[0] = _mm256_permute2f128_ps(from[0], from[stride], 0x20);
  to[stride] = _mm256_permute2f128_ps(from[0], from[stride], 0x31);
}
#endif

// to[k][lane] = from[lane][k].
template <class T>
THROUGHTIME_INLINE void turn_square(const Vector<T>* from, Vector<T>* to) {
  constexpr long W = lanes<T>;
#if defined(__AVX2__)
  constexpr long n = 16 / sizeof(T);  // of them fit a quarter
  Register of_quarters[W], turned[W];
#pragma GCC unroll 16
  for (long l = 0; l < W; l += n) {
    const Register a = (Register)from[l], b = (Register)from[l + 1];
    if constexpr (n == 2) {
      of_quarters[l] = low_pairs(a, b);
      of_quarters[l + 1] = high_pairs(a, b);
    } else {
      const Register c = (Register)from[l + 2], d = (Register)from[l + 3];
      const Register ab = low_words(a, b), cd = low_words(c, d), ab_high = high_words(a, b), cd_high = high_words(c, d);
      of_quarters[l] = low_pairs(ab, cd);
      of_quarters[l + 1] = high_pairs(ab, cd);
      of_quarters[l + 2] = low_pairs(ab_high, cd_high);
      of_quarters[l + 3] = high_pairs(ab_high, cd_high);
    }
  }
#pragma GCC unroll 4
  for (long i = 0; i < n; ++i) turn_quarters(of_quarters + i, turned + i, n);
#pragma GCC unroll 16
  for (long k = 0; k < W; ++k) to[k] = (Vector<T>)turned[k];
#else
  T lane[W][W];
  for (long l = 0; l < W; ++l) store(lane[l], from[l]);
  for (long k = 0; k < W; ++k) {
    T column[W];
    for (long l = 0; l < W; ++l) column[l] = lane[l][k];
    to[k] = load(column);
  }
#endif
}

// Element k of row l stands at from[l * stride + k]; there are `count` rows and `depth` elements of each, and zeros in the place of
// more. What is read next begins at `next` and lies there in a row: this asks the cache for as much of it as is read here.
template <class T>
THROUGHTIME_INLINE void turn_square(long count, long depth, const T* from, long stride, const T* next, Vector<T>* to) {
  constexpr long W = lanes<T>;
  Vector<T> row[W];
#pragma GCC unroll 16
  for (long l = 0; l < W; ++l) __builtin_prefetch(next + l * W, 0, 3);
  if (count >= W && depth >= W) {
#pragma GCC unroll 16
    for (long l = 0; l < W; ++l) row[l] = load(from + l * stride);
  } else {
    for (long l = 0; l < W; ++l) row[l] = l < count ? load(from + l * stride, depth) : Vector<T>{};
  }
  turn_square<T>(row, to);
}

}  // namespace throughtime::THROUGHTIME_ISA
