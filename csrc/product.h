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

// As many rows as leave their results (rows x 4 vectors) in the L1 cache.
constexpr long block_rows = 48;

// As many depths as leave a piece of a panel in the L2 cache while all rows of a block pass over it.
constexpr long block_depth = 256;

template <class T, int vectors, int rows>
THROUGHTIME_INLINE void multiply_tile(long depth, const T* a, long a_stride, const T* panel, const T* start, T* tile) {
  constexpr long W = lanes<T>;
  Vector<T> sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = start == nullptr ? load(tile + (r * vectors + v) * W) : load(start + v * W);
  for (long k = 0; k < depth; ++k) {
    Vector<T> b[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) b[v] = load(panel + (k * vectors + v) * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vector<T> x = splat(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] += x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(tile + (r * vectors + v) * W, sum[r][v]);
}

template <class T, int vectors, int rows>
THROUGHTIME_INLINE void multiply_rows(long count, long depth, const T* a, long a_stride, const T* panel,
                                      const T* start, T* tile) {
  if constexpr (rows > 0) {
    if (count == rows) return multiply_tile<T, vectors, rows>(depth, a, a_stride, panel, start, tile);
    multiply_rows<T, vectors, rows - 1>(count, depth, a, a_stride, panel, start, tile);
  }
}

// tile (rows, vectors * W) = start + a (rows, depth) . panel, with rows <= block_rows.
template <class T, int vectors>
__attribute__((noinline)) void multiply(long rows, long depth, const T* a, long a_stride, const T* panel,
                                        const T* start, T* tile) {
  constexpr long W = lanes<T>;
  const long tiles = (rows + tile_rows<vectors> - 1) / tile_rows<vectors>;
  for (long k = 0; k == 0 || k < depth; k += block_depth) {
    const long piece = depth - k < block_depth ? depth - k : block_depth;
    for (long i = 0; i < tiles; ++i) {  // tiles of even height: 8 rows are 4 + 4, not 6 + 2
      const long r = i * rows / tiles;
      multiply_rows<T, vectors, tile_rows<vectors>>((i + 1) * rows / tiles - r, piece, a + r * a_stride + k, a_stride,
                                                    panel + k * vectors * W, start, tile + r * vectors * W);
    }
    start = nullptr;
  }
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

// Element (k, gate g, unit j) is read at source[(g * units + j) * unit_stride + k * depth_stride].
template <class T>
void pack_panels(PanelShape s, long depth, const T* source, long unit_stride, long depth_stride, long first, long last,
                 T* packed) {
  constexpr long W = lanes<T>;
  const long vectors = s.gates * s.unit_vectors;
  constexpr long strip = 16;  // depths at a time, so that both sides stay in the L1 cache
  for (long p = first; p < last; ++p)
    for (long k0 = 0; k0 < depth; k0 += strip) {
      const long k1 = k0 + strip < depth ? k0 + strip : depth;
      for (long u = 0; u < s.unit_vectors; ++u)
        for (long g = 0; g < s.gates; ++g)
          for (long l = 0; l < W; ++l) {
            const long j = (p * s.unit_vectors + u) * W + l;
            T* to = packed + p * depth * vectors * W + (u * s.gates + g) * W + l;
            const T* from = source + (g * s.units + j) * unit_stride;
            for (long k = k0; k < k1; ++k) to[k * vectors * W] = j < s.units ? from[k * depth_stride] : T(0);
          }
    }
}

}  // namespace throughtime::THROUGHTIME_ISA
