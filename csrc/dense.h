// The products with weights outside the time loop: x W_ih^T for all steps before it, da W_ih after it. The panel kernel
// does them faster than MKL (docs/log.md), and MKL's bits for one row depend on how many others there are. The weights'
// gradients, sums over rows, are left to MKL, which is the faster one there.
#pragma once

#include "product.h"
#include "threads.h"

namespace throughtime::THROUGHTIME_ISA {

struct Range {
  long begin, end;
};

inline Range share(long count, long part, long parts) { return {count * part / parts, count * (part + 1) / parts}; }

// out (rows, columns) = a (rows, depth) . packed, for packed panels of {1, 4, columns}.
template <class T>
struct RowProduct {
  long rows, depth, columns;
  const T* a;
  long a_stride;
  const T* packed;
  T* out;
  long out_stride;

  static void work(void* context, int member, int members) {
    const auto& it = *static_cast<const RowProduct*>(context);
    const long panels = panel_count<T>({1, 4, it.columns});
    const bool by_rows = it.rows >= 16 * members;
    const Range rows = by_rows ? share(it.rows, member, members) : Range{0, it.rows};
    it.part(rows, by_rows ? Range{0, panels} : share(panels, member, members));
  }

  void part(Range rows, Range panels) const {
    constexpr long W = lanes<T>;
    alignas(64) T tile[block_rows * 4 * W];
    alignas(64) const T zero[4 * W] = {};
    const long size = panel_size<T>({1, 4, columns}, depth);
    for (long first = rows.begin; first < rows.end; first += block_rows) {
      const long count = rows.end - first < block_rows ? rows.end - first : block_rows;
      for (long panel = panels.begin; panel < panels.end; ++panel) {
        multiply<T, 4>(count, depth, a + first * a_stride, a_stride, packed + panel * size, zero, tile);
        for (long row = 0; row < count; ++row)
          for (long v = 0, column = panel * 4 * W; v < 4 && column < columns; ++v, column += W)
            store(out + (first + row) * out_stride + column, load(tile + (row * 4 + v) * W), columns - column);
      }
    }
  }
};

}  // namespace throughtime::THROUGHTIME_ISA
