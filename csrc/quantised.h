// Products of int8: weights rounded to 127 steps on either side of zero, each output's weights by a scale of their own, and rows of
// activations likewise, each by the largest of its numbers. The sums are integers, so they are the same on every CPU.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "product.h"

namespace throughtime::THROUGHTIME_ISA {

using Integers = VectorOf<float>::Integers;

// Weights lie as in product.h, but in fours of depths: panel[k / 4][vector][lane][k % 4].
constexpr long fours(long depth) { return (depth + 3) / 4; }
constexpr long quantised_panel(long depth) { return fours(depth) * 4 * lanes<float> * 4; }  // bytes

inline long packed_quantised_bytes(long columns, long depth) {
  return panel_count<float>(plain_panels(columns)) * quantised_panel(depth);
}

// Where this is so, the instruction takes activations as bytes from 0 on, so 128 is added to them, and their part taken off the sum.
#if defined(__AVX512VNNI__)
constexpr bool adds_128 = true;
#else
constexpr bool adds_128 = false;
#endif

// The largest of |x|, or what isn't finite if anything isn't: integers sort as floats do, and NaNs last.
inline float largest(const float* x, long count) {
  Integers most{};
  for (long j = 0; j < count; j += lanes<float>) {
    const Integers size = (Integers)load(x + j, count - j) & 0x7FFFFFFF;
    most = size > most ? size : most;
  }
  int32_t bits = 0;
  for (long l = 0; l < lanes<float>; ++l) bits = most[l] > bits ? most[l] : bits;
  float size;
  __builtin_memcpy(&size, &bits, sizeof size);
  return size;
}

// What a step of the integers stands for, and its inverse. Of what isn't finite every product is a NaN; of next to nothing, zero.
struct Scale {
  float step, inverse;

  static Scale of(float largest) {
    if (!(largest <= 3.0e38f)) return {__builtin_nanf(""), 0.0f};
    if (largest < 1.0e-30f) return {0.0f, 0.0f};
    return {largest / 127.0f, 127.0f / largest};
  }
};

// To the nearest integer, ties to even. The product is rounded by itself, or it would be fused with the sum on some CPUs only.
THROUGHTIME_INLINE Integers nearest(Vector<float> x, float inverse) {
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
  Vector<float> scaled = x * inverse;
  hold(scaled);
  const Vector<float> shifted = scaled + to_integer;
  return (Integers)shifted - 0x4B400000;
}

typedef int8_t Bytes __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES / 4)));

// `count` numbers as bytes; `to` has room for whole fours and a vector.
inline Scale quantise(const float* x, long count, int8_t* to) {
  const Scale scale = Scale::of(largest(x, count));
  for (long j = 0; j < count; j += lanes<float>) {
    Integers q = nearest(load(x + j, count - j), scale.inverse);
    if (scale.inverse == 0.0f) q = Integers{};  // 0 times what isn't finite
    const Bytes bytes = __builtin_convertvector(adds_128 ? q + 128 : q, Bytes);
    __builtin_memcpy(to + j, &bytes, sizeof bytes);
  }
  return scale;
}

inline void pack_quantised(long columns, long depth, const float* source, int8_t* packed, float* scale, int32_t* offset) {
  constexpr long W = lanes<float>, panel = 4 * W;
  const long size = quantised_panel(depth), all = panel_count<float>(plain_panels(columns)) * panel;
  for (long column = 0; column < all; ++column) {
    const bool is_there = column < columns;
    const float* const row = source + column * depth;
    const Scale of = is_there ? Scale::of(largest(row, depth)) : Scale{};
    int8_t* const to = packed + column / panel * size + column % panel * 4;
    int32_t sum = 0;
    for (long k = 0; k < fours(depth) * 4; ++k) {
      const int32_t q = is_there && k < depth && of.inverse != 0.0f ? nearest(splat(row[k]), of.inverse)[0] : 0;
      to[k / 4 * panel * 4 + k % 4] = static_cast<int8_t>(q);
      sum += q;
    }
    scale[column] = of.step;
    offset[column] = adds_128 ? static_cast<int32_t>(128u * static_cast<uint32_t>(sum)) : 0;  // modulo 2^32, as the sums are
  }
}

typedef int16_t Shorts __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES)));

// Products of neighbours, added in pairs.
THROUGHTIME_INLINE Integers multiply_pairs(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Integers x = (Integers)a, y = (Integers)b;
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// sum += x . w, four of the depth at once; `x` holds the same four activations in each lane.
THROUGHTIME_INLINE void add_fours(Integers& sum, Integers x, Integers w) {
#if defined(__AVX512VNNI__)
  sum = (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
  const Shorts a = (Shorts)x, b = (Shorts)w;
  sum += multiply_pairs((a << 8) >> 8, (b << 8) >> 8) + multiply_pairs(a >> 8, b >> 8);
#endif
}

// Some rows times `panels` panels of four vectors: tile (rows, panels * 4 * W) of sums.
template <int rows, int panels>
THROUGHTIME_INLINE void sum_fours(long depth, const int8_t* a, long a_stride, const int8_t* packed, long size,
                                  int32_t* tile) {
  constexpr long W = lanes<float>;
  constexpr int vectors = 4 * panels;
  Integers sum[rows][vectors] = {};
  for (long k = 0; k < fours(depth); ++k) {
    Integers x[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * a_stride + k * 4, sizeof four);
      x[r] = four - Integers{};
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Integers w;
      __builtin_memcpy(&w, packed + v / 4 * size + (k * 4 + v % 4) * W * 4, sizeof w);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) add_fours(sum[r][v], x[r], w);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) __builtin_memcpy(tile + (r * vectors + v) * W, &sum[r][v], sizeof sum[r][v]);
}

}  // namespace throughtime::THROUGHTIME_ISA
