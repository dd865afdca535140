// The product with packed weights: a few rows of activations times one panel of weight columns.
//
// A panel holds `vectors` vector registers' worth of columns for all depths k, in the order in which they are read:
// panel[k][vector][lane]. Each element of the result is one sum over k = 0, 1, ..., whatever the number of rows, so a
// row's bits do not depend on its neighbours.
#pragma once

#include "vector.h"

namespace throughtime::THROUGHTIME_ISA {

// Accumulators, one panel row and a broadcast must fit the registers: 32 with AVX-512, else 16.
template <int vectors>
constexpr int tile_rows = THROUGHTIME_VECTOR_BYTES == 64 ? (vectors <= 3 ? 8 : 6) : (vectors <= 3 ? 4 : 2);

// As many rows as leave their results (rows x 4 vectors) beside a piece of a panel in the nearest caches.
constexpr long block_rows = 96;

// Sums are made of pieces this long, each begun at zero: rounding errors grow with the root of a piece's length and of
// the number of pieces, not with the root of the whole depth. A piece of a panel also fits the L1 cache while all rows
// of a block pass over it.
constexpr long block_depth = 64;

// tile (rows, vectors * W) = start + a . panel, or, if `adds`, the tile itself + a . panel. Meanwhile the caches are asked
// for as much of `ahead`, unless it is null: weights that don't fit L2 come too late otherwise (85 GFLOP/s instead of 105).
template <class T, int vectors, int rows, bool adds>
THROUGHTIME_INLINE void multiply_tile(long depth, const T* a, long row_stride, long depth_stride, const T* panel,
                                      const T* start, T* tile, const T* ahead = nullptr) {
  constexpr long W = lanes<T>;
  Vector<T> sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = adds ? Vector<T>{} : load(start + v * W);
  for (long k = 0; k < depth; ++k) {
    Vector<T> b[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      b[v] = load(panel + (k * vectors + v) * W);
      hold(b[v]);
      if (ahead) __builtin_prefetch(ahead + (k * vectors + v) * W, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vector<T> x = splat(a[r * row_stride + k * depth_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] += x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* to = tile + (r * vectors + v) * W;
      store(to, adds ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class T, int vectors, int rows, bool adds>
THROUGHTIME_INLINE void multiply_rows(long count, long depth, const T* a, long a_stride, const T* panel,
                                      const T* start, T* tile, const T* ahead) {
  if constexpr (rows > 0) {
    if (count == rows) return multiply_tile<T, vectors, rows, adds>(depth, a, a_stride, 1, panel, start, tile, ahead);
    multiply_rows<T, vectors, rows - 1, adds>(count, depth, a, a_stride, panel, start, tile, ahead);
  }
}

// One piece of the depth for all rows of a block, in tiles of even height: 8 rows are 4 + 4, not 6 + 2. The last of them
// looks ahead to the next piece, which follows in memory.
template <class T, int vectors, bool adds>
__attribute__((noinline)) void multiply_piece(long rows, long depth, const T* a, long a_stride, const T* panel,
                                              const T* start, T* tile) {
  constexpr int height = tile_rows<vectors>;
  const long tiles = (rows + height - 1) / height;
  for (long i = 0; i < tiles; ++i) {
    const long r = i * rows / tiles;
    multiply_rows<T, vectors, height, adds>((i + 1) * rows / tiles - r, depth, a + r * a_stride, a_stride, panel, start,
                                            tile + r * vectors * lanes<T>,
                                            i + 1 == tiles ? panel + depth * vectors * lanes<T> : nullptr);
  }
}

// tile (rows, vectors * W) = start + a (rows, depth) . panel, with rows <= block_rows.
template <class T, int vectors>
void multiply(long rows, long depth, const T* a, long a_stride, const T* panel, const T* start, T* tile) {
  multiply_piece<T, vectors, false>(rows, depth < block_depth ? depth : block_depth, a, a_stride, panel, start, tile);
  for (long k = block_depth; k < depth; k += block_depth)
    multiply_piece<T, vectors, true>(rows, depth - k < block_depth ? depth - k : block_depth, a + k, a_stride,
                                     panel + k * vectors * lanes<T>, nullptr, tile);
}

// Where a packed matrix's columns come from: column (panel p, gate g, unit vector u, lane l) is unit
// j = (p * unit_vectors + u) * W + l of gate g.
struct PanelShape {
  int gates, unit_vectors;
  long units;
};

template <class T>
inline long panel_count(PanelShape s) {
  const long width = s.unit_vectors * lanes<T>;
  return (s.units + width - 1) / width;
}

template <class T>
inline long panel_size(PanelShape s, long depth) {
  return depth * s.gates * s.unit_vectors * lanes<T>;
}

// Element (k, gate g, unit j) is read at source[(g * units + j) * unit_stride + k * depth_stride]. One of the strides is 1:
// with unit_stride, registers are copied; else a strip of `lanes` rows is turned, which stays in the L1 cache meanwhile.
template <class T>
void pack_panels(PanelShape s, long depth, const T* source, long unit_stride, long depth_stride, long first, long last,
                 T* packed) {
  constexpr long W = lanes<T>;
  const long vectors = s.gates * s.unit_vectors;
  for (long p = first; p < last; ++p)
    for (long u = 0; u < s.unit_vectors; ++u)
      for (long g = 0; g < s.gates; ++g) {
        const long unit = (p * s.unit_vectors + u) * W, left = s.units - unit, count = left < W ? left : W;
        const T* from = source + (g * s.units + unit) * unit_stride;
        T* to = packed + (p * depth * vectors + u * s.gates + g) * W;
        for (long k = 0; k < depth; ++k, to += vectors * W, from += depth_stride) {
          if (unit_stride == 1) {
            store(to, left > 0 ? load(from, left) : Vector<T>{});
            continue;
          }
          for (long l = 0; l < W; ++l) to[l] = l < count ? from[l * unit_stride] : T(0);
        }
      }
}

}  // namespace throughtime::THROUGHTIME_ISA
