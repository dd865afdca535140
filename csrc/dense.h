// The products outside the time loop: x W_ih^T for all steps before it, and after it da W_ih and the weights' gradients.
// MKL does these at 45 to 90 GFLOP/s a core where the panel kernel reaches 100 (docs/log.md), and its bits for one row
// depend on how many others there are.
#pragma once

#include <cstdlib>

#include "product.h"
#include "threads.h"

namespace throughtime::THROUGHTIME_ISA {

struct Range {
  long begin, end;
};

inline Range share(long count, long part, long parts) { return {count * part / parts, count * (part + 1) / parts}; }

// Both products are cut in more tasks than there are threads (see run_tasks), in a multiple of their number, so that
// threads which are equally fast end together. How they are cut changes no sum.
constexpr long tasks_a_thread = 8;

inline long between(long low, long value, long high) { return value < low ? low : value > high ? high : value; }

// out (rows, columns) = a (rows, depth) . weight, in plain panels.
template <class E, class Out>
struct RowProduct {
  using T = Arithmetic<E>;
  long rows, depth, columns;
  const E* a;
  long a_stride;
  Weight<E> weight;
  Out* out;
  long out_stride;

  // Blocks of rows, and where these are too few to go round, each by some panels only.
  void run(int threads) {
    const long panels = panel_count<E>(plain_panels(columns));
    long blocks = (rows + block_rows - 1) / block_rows, cuts = 1;
    if (threads > 1 && blocks) {
      blocks = between(1, (blocks + threads - 1) / threads * threads, rows);
      cuts = between(1, threads * tasks_a_thread / blocks, panels);
    }
    struct Task {
      const RowProduct& product;
      long panels, blocks, cuts;
    } task{*this, panels, blocks, cuts};
    run_tasks(
        threads, blocks * cuts,
        [](void* context, long i, int) {
          const auto& it = *static_cast<const Task*>(context);
          it.product.part(share(it.product.rows, i / it.cuts, it.blocks), share(it.panels, i % it.cuts, it.cuts));
        },
        &task);
  }

  void part(Range block, Range panels) const {
    constexpr long W = lanes<T>;
    alignas(64) T tile[block_rows * 4 * W];
    alignas(64) const T zero[4 * W] = {};
    for (long panel = panels.begin; panel < panels.end; ++panel) {
      multiply_panel<E, 4>(plain_panels(columns), panel, block.end - block.begin, depth, a + block.begin * a_stride, a_stride,
                           weight, zero, tile);
      const long count = block.end - block.begin, left = columns - panel * 4 * W, stride = out_stride;
      Out* to = out + block.begin * stride + panel * 4 * W;
      if (left >= 4 * W) {
        for (long row = 0; row < count; ++row, to += stride)
#pragma GCC unroll 4
          for (long v = 0; v < 4; ++v) store(to + v * W, load(tile + (row * 4 + v) * W));
      } else {
        for (long row = 0; row < count; ++row, to += stride)
          for (long v = 0; v * W < left; ++v) store(to + v * W, load(tile + (row * 4 + v) * W), left - v * W);
      }
    }
  }
};

// sum (left, right) += a^T b for a (rows, left), b (rows, right); and bias (left) += a summed over its rows. a is read
// down its columns: keep its stride away from powers of two.
template <class E>
struct OuterProduct {
  using T = Arithmetic<E>;
  long rows, left, right;
  const E* a;
  long a_stride;
  const E* b;
  long b_stride;
  T* sum;
  T* bias;  // or null

  E* workspace;  // workspace_size() for each thread

  static constexpr int height = tile_rows<4>;
  static constexpr long W = lanes<E>;
  static constexpr long step = depth_step<E>, most_rows = 256 * step;

  // Rows at a time: as many as leave a packed piece of b in the L2 cache.
  long depth() const {
    const long width = between(1, panels(), panels()) * 4 * W;  // of no columns a^T b is nothing, and the bias is summed
    const long fitting = (512L << 10) / static_cast<long>(sizeof(E)) / width / step * step;
    return between(64 * step, fitting, most_rows);
  }
  long panels() const { return panel_count<E>(plain_panels(right)); }
  int vectors(long panel) const { return panel_vectors<E>(plain_panels(right), panel); }
  long workspace_size() const { return depth() * panels() * 4 * W; }

  // A task packs all of b for itself: let it have rows enough of the sum to pay for that.
  long blocks(int threads) const {
    constexpr long enough = 16;
    return threads == 1 ? 1 : between(1, threads * between(1, tiles() / (enough * threads), tasks_a_thread), tiles());
  }
  long tiles() const { return (left + height - 1) / height; }

  void run(int threads) {
    struct Task {
      const OuterProduct& product;
      long blocks;
    } task{*this, blocks(threads)};
    run_tasks(
        threads, task.blocks,
        [](void* context, long i, int member) {
          const auto& [product, blocks] = *static_cast<const Task*>(context);
          product.part(share(product.tiles(), i, blocks), product.workspace + member * product.workspace_size());
        },
        &task);
  }

  void part(Range tiles, E* packed) const {
    constexpr long few = 4;  // panels for which copying a's columns together costs more than reading them apart
    const long deep = depth(), end = tiles.end * height;
    alignas(64) E column[most_rows * height + 16];  // and what pack_left writes too much
    for (long first = 0; first < rows; first += deep) {
      const long count = rows - first < deep ? rows - first : deep;
      for (long panel = 0; panel < panels(); ++panel)
        pack_right(first, count, panel * 4 * W, vectors(panel), packed + panel * deep * 4 * W);
      for (long tile = tiles.begin; tile < tiles.end; ++tile) {
        const E* from = a + first * a_stride + tile * height;
        const bool copies = step > 1 || (panels() > few && left - tile * height >= height);
        if (copies) pack_left(count, from, left - tile * height, column);
        for (long panel = 0; panel < panels(); ++panel)
          add_tile<height, 4>(count, copies ? column : from, copies ? height * step : a_stride,
                              packed + panel * deep * 4 * W, tile * height, panel * 4 * W, vectors(panel));
      }
      if (bias) add_bias(first, count, {tiles.begin * height, end < left ? end : left});
    }
  }

  // column[k / step][row][k % step] = from[k][row], for `height` rows, or the `n` that are left.
  void pack_left(long count, const E* from, long n, E* column) const {
    if constexpr (is_narrow<E>) {
      typedef uint16_t Eight __attribute__((vector_size(16)));
      typedef uint32_t Pairs __attribute__((vector_size(32)));
      static_assert(height <= 8);
      const size_t bytes = n < 8 ? n * sizeof(E) : sizeof(Eight);
      for (long k = 0; k < count; k += 2, from += 2 * a_stride, column += 2 * height) {
        Eight first{}, second{};
        if (n < 8) {
          __builtin_memcpy(&first, from, bytes);
          if (k + 1 < count) __builtin_memcpy(&second, from + a_stride, bytes);
        } else {
          __builtin_memcpy(&first, from, sizeof first);
          if (k + 1 < count) __builtin_memcpy(&second, from + a_stride, sizeof second);
        }
        const Pairs pairs = __builtin_convertvector(first, Pairs) | __builtin_convertvector(second, Pairs) << 16;
        __builtin_memcpy(column, &pairs, sizeof pairs);
      }
    } else {
      for (long k = 0; k < count; ++k)
        for (int r = 0; r < height; ++r) column[k * height + r] = from[k * a_stride + r];
    }
  }

  void pack_right(long first, long count, long column, int vectors, E* to) const {
    for (long k = 0; k < count; k += step)
      for (long v = 0; v < vectors; ++v) {
        const long n = right - column - v * W;
        const E* from = b + (first + k) * b_stride + column + v * W;
        const Vector<E> one = load(from, n);
        if constexpr (is_narrow<E>)
          store_pairs(to + (k * vectors + v * step) * W, (Words)one,
                      k + 1 < count ? (Words)load(from + b_stride, n) : Words{});
        else
          store(to + (k * vectors + v) * W, one);
      }
  }

  void add_bias(long first, long count, Range columns) const {
    for (long column = columns.begin; column < columns.end; column += W) {
      const long n = columns.end - column;
      Vector<T> total{};
      for (long k = 0; k < count; ++k) total += load(a + (first + k) * a_stride + column, n);
      store(bias + column, load(bias + column, n) + total, n);
    }
  }

  // A tile of as many rows and vectors of the sum as there are.
  template <int high, int wide>
  void add_tile(long count, const E* from_a, long stride, const E* from_b, long row, long column, int vectors) const {
    if constexpr (high > 1)
      if (left - row < high) return add_tile<high - 1, wide>(count, from_a, stride, from_b, row, column, vectors);
    if constexpr (wide > 1)
      if (vectors < wide) return add_tile<high, wide - 1>(count, from_a, stride, from_b, row, column, vectors);
    alignas(64) T tile[high * wide * W];
    alignas(64) const T zero[wide * W] = {};
    multiply_tile<E, wide, high, false>(count, from_a, step, stride, from_b, zero, tile, wide * W);
    for (long r = 0; r < high; ++r)
      for (long v = 0; v < wide; ++v) {
        T* to = sum + (row + r) * right + column + v * W;
        const long n = right - column - v * W;
        store(to, load(to, n) + load(tile + (r * wide + v) * W), n);
      }
  }
};

// table (V, columns)[ids[row]] += a (rows, columns)[row], row after row; rows of the table are a stride apart. Members own columns, so that the bits of a sum
// depend on nothing but the rows and their order.
template <class E>
struct RowSums {
  using T = Arithmetic<E>;
  long rows, columns;
  const E* a;
  long a_stride;
  const int64_t* ids;
  T* table;
  long table_stride;

  static void work(void* context, int member, int members) {
    const auto& it = *static_cast<const RowSums*>(context);
    constexpr long W = lanes<E>;
    const Range vectors = share((it.columns + W - 1) / W, member, members);
    const long end = vectors.end * W < it.columns ? vectors.end * W : it.columns;
    for (long row = 0; row < it.rows; ++row) {
      const E* from = it.a + row * it.a_stride;
      T* to = it.table + it.ids[row] * it.table_stride;
      for (long column = vectors.begin * W; column < end; column += W) {
        const long n = end - column;
        store(to + column, load(to + column, n) + load(from + column, n), n);
      }
    }
  }
};

}  // namespace throughtime::THROUGHTIME_ISA
