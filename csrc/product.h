// The product with packed weights: a few rows of activations times one panel of weight columns.
//
// A panel holds `vectors` vector registers' worth of columns for all depths k, in the order in which they are read:
// panel[k][vector][lane]; the last one holds only as many vectors as there are columns for. Elements narrower than their arithmetic lie in pairs of depths, panel[k / 2][vector][lane][k % 2],
// as the instruction takes them that multiplies pairs; the last of an odd depth has a zero beside it. Each element of the
// result is one sum over k = 0, 1, ..., whatever the number of rows, so a row's bits do not depend on its neighbours.
#pragma once

#include "turn.h"

namespace throughtime::THROUGHTIME_ISA {

// Accumulators, one panel row and a broadcast must fit the registers: 32 with AVX-512, else 16.
template <int vectors>
constexpr int tile_rows = THROUGHTIME_VECTOR_BYTES == 64 ? (vectors <= 3 ? 8 : 6) : (vectors <= 3 ? 4 : 2);

// As many rows as leave their results (rows x 4 vectors) beside a piece of a panel in the nearest caches.
constexpr long block_rows = 96;

// Sums are made of pieces this long, each begun at zero: rounding errors grow with the root of a piece's length and of
// the number of pieces, not with the root of the whole depth. A piece of a panel also fits the L1 cache while all rows
// of a block pass over it.
template <class E>
constexpr long block_depth = is_narrow<E> ? 128 : 64;

// How many elements along the depth one instruction multiplies.
template <class E>
constexpr long depth_step = sizeof(Arithmetic<E>) / sizeof(E);

template <class E>
constexpr long whole_steps(long depth) {
  return (depth + depth_step<E> - 1) / depth_step<E> * depth_step<E>;
}

// What a product takes of one depth step: a vector of numbers, or of pairs, each in the bits of one number.
template <class E>
struct Operand {
  using Type = Vector<E>;
};
template <>
struct Operand<Bf16> {
  using Type = Words;
};

template <class E>
THROUGHTIME_INLINE typename Operand<E>::Type load_operand(const E* from) {
  typename Operand<E>::Type v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// The same for one row of activations; of the last step of an odd depth there are fewer `elements`.
template <class E>
THROUGHTIME_INLINE typename Operand<E>::Type splat_operand(const E* from, long elements) {
  if constexpr (is_narrow<E>) {
    uint32_t pair = 0;
    __builtin_memcpy(&pair, from, elements * sizeof(E));
    return pair - Words{};
  } else {
    return splat(*from);
  }
}

template <class E>
THROUGHTIME_INLINE void add_product(Vector<E>& sum, typename Operand<E>::Type x, typename Operand<E>::Type b) {
  if constexpr (is_narrow<E>) {
#if defined(__AVX512BF16__)
    sum = (Vector<E>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)b);
#else
    sum += (Vector<E>)(x << 16) * (Vector<E>)(b << 16);
    sum += (Vector<E>)(x & 0xFFFF0000) * (Vector<E>)(b & 0xFFFF0000);
#endif
  } else {
    sum += x * b;
  }
}

// tile (rows, vectors * W) = start + a . panel, or, if `adds`, the tile itself + a . panel. Element (r, k) of `a` is at
// a[r * row_stride + k / step * step_stride + k % step], with step = depth_step. Meanwhile the caches are asked
// for as much of `ahead`, unless it is null: weights that don't fit L2 come too late otherwise (85 GFLOP/s instead of 105). For so few
// rows that a product waits for weights, that is the nearest cache (52 instead of 40, of a row on a Zen 5); for more the second.
template <class E, int vectors, int rows, bool adds>
THROUGHTIME_INLINE void multiply_tile(long depth, const E* a, long row_stride, long step_stride, const E* panel,
                                      const Arithmetic<E>* start, Arithmetic<E>* tile, long tile_stride,
                                      const E* ahead = nullptr) {
  constexpr long W = lanes<E>, step = depth_step<E>;
  constexpr int nearness = rows <= 4 ? 3 : 2;
  Vector<E> sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = adds ? Vector<E>{} : load(start + v * W);
  const auto add_step = [&](long k, long elements) __attribute__((always_inline)) {
    typename Operand<E>::Type b[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      b[v] = load_operand(panel + (k * vectors + v) * W * step);
      hold(b[v]);
      if (ahead) __builtin_prefetch(ahead + (k * vectors + v) * W * step, 0, nearness);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const auto x = splat_operand(a + r * row_stride + k * step_stride, elements);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) add_product<E>(sum[r][v], x, b[v]);
    }
  };
  for (long k = 0; k < depth / step; ++k) add_step(k, step);
  if constexpr (step > 1)
    if (depth % step) add_step(depth / step, 1);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Arithmetic<E>* to = tile + r * tile_stride + v * W;
      store(to, adds ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class E, int vectors, int rows, bool adds>
THROUGHTIME_INLINE void multiply_rows(long count, long depth, const E* a, long a_stride, const E* panel,
                                      const Arithmetic<E>* start, Arithmetic<E>* tile, long tile_stride, const E* ahead) {
  if constexpr (rows > 0) {
    if (count == rows)
      return multiply_tile<E, vectors, rows, adds>(depth, a, a_stride, depth_step<E>, panel, start, tile, tile_stride, ahead);
    multiply_rows<E, vectors, rows - 1, adds>(count, depth, a, a_stride, panel, start, tile, tile_stride, ahead);
  }
}

// One piece of the depth for all rows of a block, in tiles of even height: 8 rows are 4 + 4, not 6 + 2. The last of them
// looks ahead to the next piece, which follows in memory.
template <class E, int vectors, bool adds>
__attribute__((noinline)) void multiply_piece(long rows, long depth, const E* a, long a_stride, const E* panel,
                                              const Arithmetic<E>* start, Arithmetic<E>* tile, long tile_stride) {
  constexpr int height = tile_rows<vectors>;
  const long tiles = (rows + height - 1) / height;
  for (long i = 0; i < tiles; ++i) {
    const long r = i * rows / tiles;
    multiply_rows<E, vectors, height, adds>((i + 1) * rows / tiles - r, depth, a + r * a_stride, a_stride, panel, start,
                                            tile + r * tile_stride, tile_stride,
                                            i + 1 == tiles ? panel + whole_steps<E>(depth) * vectors * lanes<E> : nullptr);
  }
}

// tile (rows, there * W) = start + a (rows, depth) . panel, of as many vectors as are `there`, with rows <= block_rows.
template <class E, int vectors>
void multiply(int there, long rows, long depth, const E* a, long a_stride, const E* panel, const Arithmetic<E>* start,
              Arithmetic<E>* tile, long tile_stride) {
  if constexpr (vectors > 1)
    if (there < vectors)
      return multiply<E, vectors - 1>(there, rows, depth, a, a_stride, panel, start, tile, tile_stride);
  constexpr long most = block_depth<E>;
  multiply_piece<E, vectors, false>(rows, depth < most ? depth : most, a, a_stride, panel, start, tile, tile_stride);
  for (long k = most; k < depth; k += most)
    multiply_piece<E, vectors, true>(rows, depth - k < most ? depth - k : most, a + k, a_stride,
                                     panel + k * vectors * lanes<E>, nullptr, tile, tile_stride);
}

// Where a packed matrix's columns come from: column (panel p, gate g, unit vector u, lane l) is unit
// j = (p * unit_vectors + u) * W + l of gate g.
struct PanelShape {
  int gates, unit_vectors;
  long units;
};

inline PanelShape plain_panels(long columns) { return {1, 4, columns}; }

template <class E>
inline long panel_count(PanelShape s) {
  const long width = s.unit_vectors * lanes<E>;
  return (s.units + width - 1) / width;
}

// What lies between the beginnings of two panels.
template <class E>
inline long panel_size(PanelShape s, long depth) {
  return whole_steps<E>(depth) * s.gates * s.unit_vectors * lanes<E>;
}

// How many vectors a panel holds.
template <class E>
inline int panel_vectors(PanelShape s, long panel) {
  const long left = (s.units - panel * s.unit_vectors * lanes<E> + lanes<E> - 1) / lanes<E>;
  return s.gates * static_cast<int>(left < s.unit_vectors ? left : s.unit_vectors);
}

// One depth step of one vector of columns, of numbers that fit the upper half of a word.
THROUGHTIME_INLINE void store_pairs(Bf16* to, Words first, Words second) {
  const Words pairs = first >> 16 | second;
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

// Where the n-th vector of columns begins among the columns of all gates.
template <class E>
inline long first_column(PanelShape s, long n) {
  const long vectors = s.gates * s.unit_vectors, panel = n / vectors, v = n % vectors;
  return v % s.gates * s.units + (panel * s.unit_vectors + v / s.gates) * lanes<E>;
}

// How many of its columns there are: at most a vector of them, or none and less.
template <class E>
inline long columns_left(PanelShape s, long n) {
  const long vectors = s.gates * s.unit_vectors;
  return s.units - (n / vectors * s.unit_vectors + n % vectors / s.gates) * lanes<E>;
}

// One depth step of a vector of columns, from the numbers at its depths.
template <class E>
THROUGHTIME_INLINE typename Operand<E>::Type as_operand(const Vector<E>* v) {
  if constexpr (is_narrow<E>)
    return round_to_upper_half(v[0]) >> 16 | round_to_upper_half(v[1]);
  else
    return v[0];
}

// The n-th vector of columns, to `to`, whose depth steps are `stride` apart.
template <class E>
void pack_vector(PanelShape s, long n, long depth, const Arithmetic<E>* source, long column_stride, long depth_stride,
                 E* to, long stride) {
  using T = Arithmetic<E>;
  constexpr long W = lanes<E>, step = depth_step<E>;
  const long count = columns_left<E>(s, n);
  const T* const from = source + first_column<E>(s, n) * column_stride;
  const T* const next = source + first_column<E>(s, n + 1) * column_stride;
  Vector<T> square[W] = {};
  for (long k = 0; k < depth; k += W) {
    const long deep = depth - k < W ? depth - k : W;
    if (column_stride != 1 && count > 0)
      turn_square<T>(count, deep, from + k, column_stride, next + k * W, square);
    else
      for (long i = 0; i < W; ++i)
        square[i] = i < deep && count > 0 ? load(from + (k + i) * depth_stride, count) : Vector<T>{};
    for (long i = 0; i < deep; i += step) {
      const auto operand = as_operand<E>(square + i);
      __builtin_memcpy(to + (k + i) / step * stride, &operand, sizeof operand);
    }
  }
}

// Element (k, gate g, unit j) is read at source[(g * units + j) * unit_stride + k * depth_stride]. One of the strides is 1: with
// unit_stride registers are copied, else squares are turned.
template <class E>
void pack_panels(PanelShape s, long depth, const Arithmetic<E>* source, long unit_stride, long depth_stride, long first,
                 long last, E* packed) {
  constexpr long wide = lanes<E> * depth_step<E>;
  const long vectors = s.gates * s.unit_vectors;
  for (long panel = first; panel < last; ++panel) {
    const int there = panel_vectors<E>(s, panel);
    for (int v = 0; v < there; ++v)
      pack_vector<E>(s, panel * vectors + v, depth, source, unit_stride, depth_stride,
                     packed + panel * panel_size<E>(s, depth) + v * wide, there * wide);
  }
}

// A few rows times the n-th vector of columns of weights as torch has them; each sum is taken as `multiply` takes it.
template <class E, int rows>
THROUGHTIME_INLINE void multiply_few(PanelShape s, long n, long depth, const E* a, long a_stride, const Weight<E>& weight,
                                     Vector<E> start, Arithmetic<E>* out, long out_stride) {
  using T = Arithmetic<E>;
  constexpr long W = lanes<E>, step = depth_step<E>, most = block_depth<E>;
  const long count = columns_left<E>(s, n);
  const T* const from = weight.plain + first_column<E>(s, n) * weight.stride;
  const T* const next = weight.plain + first_column<E>(s, n + 1) * weight.stride;
  Vector<E> total[rows] = {}, sum[rows];
  const auto add = [&](const Vector<T>* square, long k, long elements) __attribute__((always_inline)) {
    const auto b = as_operand<E>(square);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) add_product<E>(sum[r], splat_operand(a + r * a_stride + k, elements), b);
  };
  for (long begin = 0; begin < depth; begin += most) {
    const long end = depth - begin < most ? depth : begin + most;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sum[r] = begin ? Vector<E>{} : start;
    for (long k = begin; k < end; k += W) {
      const long deep = end - k < W ? end - k : W;
      Vector<T> square[W];
      turn_square<T>(count, deep, from + k, weight.stride, next + k * W, square);
      if (deep == W) {
#pragma GCC unroll 16
        for (long i = 0; i < W; i += step) add(square + i, k + i, step);
      } else {
        for (long i = 0; i < deep; i += step) add(square + i, k + i, deep - i < step ? deep - i : step);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) total[r] = begin ? total[r] + sum[r] : sum[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) store(out + r * out_stride, total[r]);
}

// As many rows at once as leave the registers to a square of weights.
constexpr int few_rows = 4;

template <class E>
__attribute__((noinline)) void multiply_vector(PanelShape s, long n, long rows, long depth, const E* a, long a_stride,
                                               const Weight<E>& weight, Vector<E> start, Arithmetic<E>* out, long out_stride) {
  switch (rows) {
    case 1: return multiply_few<E, 1>(s, n, depth, a, a_stride, weight, start, out, out_stride);
    case 2: return multiply_few<E, 2>(s, n, depth, a, a_stride, weight, start, out, out_stride);
    case 3: return multiply_few<E, 3>(s, n, depth, a, a_stride, weight, start, out, out_stride);
    default: return multiply_few<E, few_rows>(s, n, depth, a, a_stride, weight, start, out, out_stride);
  }
}

// tile (rows, vectors * W) = start + a (rows, depth) . a panel of the weights, with rows <= block_rows.
template <class E, int vectors>
THROUGHTIME_INLINE void multiply_panel(PanelShape s, long panel, long rows, long depth, const E* a, long a_stride,
                                       const Weight<E>& weight, const Arithmetic<E>* start, Arithmetic<E>* tile) {
  constexpr long W = lanes<E>;
  if (weight.packed)
    return multiply<E, vectors>(panel_vectors<E>(s, panel), rows, depth, a, a_stride,
                                weight.packed + panel * panel_size<E>(s, depth), start, tile, vectors * W);
  for (long r = 0; r < rows; r += few_rows)
    for (long v = 0; v < vectors && columns_left<E>(s, panel * vectors + v) > 0; ++v)
      multiply_vector<E>(s, panel * vectors + v, rows - r < few_rows ? rows - r : few_rows, depth, a + r * a_stride, a_stride,
                         weight, load(start + v * W), tile + (r * vectors + v) * W, vectors * W);
}

}  // namespace throughtime::THROUGHTIME_ISA
