// One vector register of floats or doubles, by the compiler's vector extensions, and the functions that cells need.
//
// Every translation unit that includes this names its instruction set in THROUGHTIME_ISA (a namespace) and its register
// width in THROUGHTIME_VECTOR_BYTES. Nothing here or in the headers built on it may instantiate a std template: the
// linker would keep one copy of it for all instruction sets.
#pragma once

#include <cstdint>

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

template <class T>
using Vector = typename VectorOf<T>::Floats;

template <class T>
constexpr long lanes = THROUGHTIME_VECTOR_BYTES / sizeof(T);

template <class T>
THROUGHTIME_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};  // x - 0 is x for every x, so this is a plain broadcast; x + 0 is not
}

template <class T>
THROUGHTIME_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
THROUGHTIME_INLINE void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
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
template <class T>
THROUGHTIME_INLINE Vector<T> load(const T* from, long count) {
  if (count >= lanes<T>) return load(from);
  Vector<T> v{};
  for (long lane = 0; lane < count; ++lane) v[lane] = from[lane];
  return v;
}

template <class T>
THROUGHTIME_INLINE void store(T* to, Vector<T> v, long count) {
  if (count >= lanes<T>) return store(to, v);
  for (long lane = 0; lane < count; ++lane) to[lane] = v[lane];
}

// Comparisons are written so that a NaN passes through.
template <class V, class S>
THROUGHTIME_INLINE V clamp(V x, S low, S high) {
  x = x < low ? low - V{} : x;
  return x > high ? high - V{} : x;
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
  const Vector<T> q = E::parts(clamp(-x, E::lowest, E::highest), power);
  return T(1) / (power * q + (power + T(1)));
}

// With e = expm1(2|x|): e / (e + 2) keeps its relative accuracy at small x, 1 - 2 / (e + 2) is the closer one to 1.
template <class T>
THROUGHTIME_INLINE Vector<T> tanh(Vector<T> x) {
  using E = Exponential<T>;
  using V = Vector<T>;
  const V size = x < T(0) ? -x : x;
  V power;
  const V q = E::parts(clamp(size + size, T(0), E::tanh_end), power);
  const V e = power * q + (power - T(1));
  const auto is_small = e < T(1);
  const V fraction = (is_small ? e : T(2) - V{}) / (e + T(2));
  const V y = is_small ? fraction : T(1) - fraction;
  return x < T(0) ? -y : y;
}

}  // namespace throughtime::THROUGHTIME_ISA
