// One vector register of floats or doubles (bfloat16 is widened on the way in, rounded on the way out), by the compiler's vector extensions, and the functions that cells need.
//
// Every translation unit that includes this names its instruction set in THROUGHTIME_ISA (a namespace) and its register
// width in THROUGHTIME_VECTOR_BYTES. Nothing here or in the headers built on it may instantiate a std template: the
// linker would keep one copy of it for all instruction sets.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own intrinsics (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "request.h"

#define THROUGHTIME_INLINE inline __attribute__((always_inline))

namespace throughtime::THROUGHTIME_ISA {

template <class T>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float Floats __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES)));
};

template <>
struct VectorOf<double> {
  typedef double Floats __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES)));
};

template <class E>
using Vector = typename VectorOf<Arithmetic<E>>::Floats;

template <class E>
constexpr long lanes = THROUGHTIME_VECTOR_BYTES / sizeof(Arithmetic<E>);

template <class E>
constexpr bool is_narrow = sizeof(E) < sizeof(Arithmetic<E>);

template <class T>
THROUGHTIME_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};  // x - 0 is x for every x, so this is a plain broadcast; x + 0 is not
}

typedef uint32_t Words __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(THROUGHTIME_VECTOR_BYTES / 2)));

// To the nearest bfloat16, ties to even, in the upper half of each word; a NaN stays one, whatever its payload.
THROUGHTIME_INLINE Words round_to_upper_half(Vector<float> v) {
  const Words bits = (Words)v, rounded = bits + (0x7FFF + ((bits >> 16) & 1));
  return (v == v ? rounded : (bits | 0x400000)) & 0xFFFF0000;
}

template <class E>
THROUGHTIME_INLINE Vector<E> load(const E* from) {
  if constexpr (is_narrow<E>) {
    HalfWords halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return (Vector<E>)(__builtin_convertvector(halves, Words) << 16);
  } else {
    Vector<E> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class E>
THROUGHTIME_INLINE void store(E* to, Vector<E> v) {
  if constexpr (!is_narrow<E>) {
    __builtin_memcpy(to, &v, sizeof v);
  } else {
#if defined(__AVX512BF16__)
    const auto halves = _mm512_cvtneps_pbh((__m512)v);
#else
    const auto halves = __builtin_convertvector(round_to_upper_half(v) >> 16, HalfWords);
#endif
    __builtin_memcpy(to, &halves, sizeof halves);
  }
}

// Keep a value in a register: GCC would rather read it from memory again at each use, and loads are what runs out.
template <class V>
THROUGHTIME_INLINE void hold(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;
#endif
}

// The last vector of a row may be partial: lanes past `count` are zero, and are never read or written in memory.
template <class E>
THROUGHTIME_INLINE Vector<E> load(const E* from, long count) {
  if (count >= lanes<E>) return load(from);
#if defined(__AVX512F__) && THROUGHTIME_VECTOR_BYTES == 64
  const auto there = (1u << count) - 1;
  if constexpr (sizeof(E) == 8)
    return (Vector<E>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(there), from);
  else if constexpr (sizeof(E) == 4)
    return (Vector<E>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), from);
  else
    return (Vector<E>)((Words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(there), from)) << 16);
#else
  E all[lanes<E>] = {};
  for (long lane = 0; lane < count; ++lane) all[lane] = from[lane];
  return load(all);
#endif
}

template <class E>
THROUGHTIME_INLINE void store(E* to, Vector<E> v, long count) {
  if (count >= lanes<E>) return store(to, v);
#if defined(__AVX512F__) && THROUGHTIME_VECTOR_BYTES == 64
  const auto there = (1u << count) - 1;
  if constexpr (sizeof(E) == 8) return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(there), (__m512d)v);
  if constexpr (sizeof(E) == 4) return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(there), (__m512)v);
#endif
  E all[lanes<E>];
  store(all, v);
  for (long lane = 0; lane < count; ++lane) to[lane] = all[lane];
}

// share * old + (1 - share) * fresh. Rounded in one way wherever it stands, as a compiler might fuse either product with the sum.
template <class V>
THROUGHTIME_INLINE V blend(V share, V old, V fresh) {
  V added = (1 - share) * fresh;
  hold(added);
  return share * old + added;
}

// A NaN passes through: x86's own instructions give the second of two numbers that can't be compared.
template <class T>
THROUGHTIME_INLINE Vector<T> at_most(T high, Vector<T> x) {
#if defined(__AVX512F__) && THROUGHTIME_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8)
    return (Vector<T>)_mm512_min_pd((__m512d)splat(high), (__m512d)x);
  else
    return (Vector<T>)_mm512_min_ps((__m512)splat(high), (__m512)x);
#else
  return high < x ? splat(high) : x;
#endif
}

template <class T>
THROUGHTIME_INLINE Vector<T> at_least(T low, Vector<T> x) {
#if defined(__AVX512F__) && THROUGHTIME_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 8)
    return (Vector<T>)_mm512_max_pd((__m512d)splat(low), (__m512d)x);
  else
    return (Vector<T>)_mm512_max_ps((__m512)splat(low), (__m512)x);
#else
  return low > x ? splat(low) : x;
#endif
}

// x = n ln 2 + r with |r| <= ln 2 / 2: returns 2^n and q = expm1(r), so that exp(x) = 2^n (1 + q).
template <class T>
struct Exponential;

template <>
struct Exponential<float> {
  using V = Vector<float>;
  static constexpr float lowest = -87.0f, highest = 88.0f, tanh_end = 20.0f;

  static THROUGHTIME_INLINE V parts(V x, V& power) {
    const V shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are n
    const V n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    using I = VectorOf<float>::Integers;
    const I bits = ((I)shifted - 0x4B400000 + 127) << 23;
    power = (V)bits;
    V p = splat(1.98919814e-4f);
    p = p * r + 1.39345419e-3f;
    p = p * r + 8.33331002e-3f;
    p = p * r + 4.16664568e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    return (p * r) * r + r;
  }
};

template <>
struct Exponential<double> {
  using V = Vector<double>;
  static constexpr double lowest = -708.0, highest = 709.0, tanh_end = 44.0;

  static THROUGHTIME_INLINE V parts(V x, V& power) {
    const V shifted = x * 1.44269504088896340736 + 6755399441055744.0;  // 1.5 * 2^52
    const V n = shifted - 6755399441055744.0;
    V r = x - n * 6.93147180369123816490e-01;
    r = r - n * 1.90821492927058770002e-10;
    using I = VectorOf<double>::Integers;
    const I bits = ((I)shifted - 0x4338000000000000 + 1023) << 52;
    power = (V)bits;
    V p = splat(1.0 / 6227020800);  // Taylor: the first term left out is below 2^-56 of the result
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    return (p * r) * r + r;
  }
};

template <class T>
THROUGHTIME_INLINE Vector<T> sigmoid(Vector<T> x) {
  using E = Exponential<T>;
  Vector<T> power;
  const Vector<T> q = E::parts(at_most(E::highest, at_least(E::lowest, -x)), power);
  return T(1) / (power * q + (power + T(1)));
}

// With e = expm1(2|x|): e / (e + 2) keeps its relative accuracy at small x, 1 - 2 / (e + 2) is the closer one to 1.
template <class T>
THROUGHTIME_INLINE Vector<T> tanh(Vector<T> x) {
  using E = Exponential<T>;
  using V = Vector<T>;
  using I = typename VectorOf<T>::Integers;
  const I sign = (I)x & (I)(-V{});
  const V size = (V)((I)x ^ sign);
  V power;
  const V q = E::parts(at_most(E::tanh_end, size + size), power);
  const V e = power * q + (power - T(1));
  const auto is_small = e < T(1);
  const V fraction = (is_small ? e : T(2) - V{}) / (e + T(2));
  const V y = is_small ? fraction : T(1) - fraction;
  return (V)((I)y | sign);
}

}  // namespace throughtime::THROUGHTIME_ISA
