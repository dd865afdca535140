// What every time loop has in common: how a call's threads divide its work, and which rows and columns are a member's.
//
// A call's threads are cut in groups; each group has rows of its own and never meets another. Where there are too few
// rows for that, the members of a group share its rows and divide the hidden units (panels of packed weights) between
// them, and meet at a barrier in each step. All of a member's loops say which: `rows` are its group's, panels are its
// own.
#pragma once

#include <cstdlib>
#include <cstring>

#include "dense.h"
#include "product.h"
#include "sequence.h"
#include "threads.h"

namespace throughtime::THROUGHTIME_ISA {

inline PanelShape plain_panels(long columns) { return {1, 4, columns}; }

template <class T>
inline long packed_size(PanelShape shape, long depth) {
  return panel_count<T>(shape) * panel_size<T>(shape, depth);
}

template <class T>
struct PackTask {
  PanelShape shape;
  long depth;
  const T* source;
  long unit_stride, depth_stride;
  T* packed;
};

template <class T>
inline void pack(const PackTask<T>& task, int threads) {
  if (panel_size<T>(task.shape, task.depth) * panel_count<T>(task.shape) < 65536) threads = 1;
  run_together(
      threads,
      [](void* context, int member, int members) {
        const auto& t = *static_cast<const PackTask<T>*>(context);
        const Range p = share(panel_count<T>(t.shape), member, members);
        pack_panels<T>(t.shape, t.depth, t.source, t.unit_stride, t.depth_stride, p.begin, p.end, t.packed);
      },
      const_cast<PackTask<T>*>(&task));
}

// How a call's threads divide its work.
struct Plan {
  long groups, parts;
};

inline Plan plan(const Layout& s, long members) {
  constexpr long few = 4;  // rows for which reading all weights costs a thread more than meeting the others
  long groups = members;
  while (groups > 1 && (s.batch < few * groups || members % groups)) --groups;
  if (s.batch >= few * members) groups = members;
  return {groups, members / groups};
}

// A step too small to share: meeting would cost more than it saves.
inline int useful_threads(const Layout& s) {
  const long multiplications = s.batch * s.hidden * s.width() * gate_count(s.cell);
  const bool meets = s.batch < 4 * s.threads;
  if (meets && multiplications < 20000) return 1;
  return (s.end - s.begin) * multiplications < 50000 ? 1 : s.threads;
}

// Rows of activations, private to a group and away from powers of two, where the cache's sets would collide.
template <class T>
struct Rows {
  T* data = nullptr;
  long stride = 0;

  T* at(long row) const { return data + row * stride; }
};

template <class T>
inline long row_stride(long columns) {
  constexpr long W = lanes<T>;
  return (columns + W - 1) / W * W + 64 / sizeof(T);
}

// What forward and backward have in common: which rows and columns are a member's, and how they are addressed.
template <class T>
class Member {
 public:
  Member(const Layout& s, Plan plan, long member, Barrier* barrier)
      : layout_(s), groups_(plan.groups), group_(member / plan.parts), parts_(plan.parts), part_(member % plan.parts),
        barrier_(barrier) {}

 protected:
  long active(long t) const { return layout_.rows ? layout_.rows[t] : layout_.batch; }
  long mine(long rows) const { return (rows - group_ + groups_ - 1) / groups_; }
  long rank(long row) const { return group_ + row * groups_; }
  long column(long row) const { return layout_.order ? layout_.order[rank(row)] : rank(row); }
  long packed_row(long t, long row) const {
    return (layout_.first_row ? layout_.first_row[t] : t * layout_.batch) + rank(row);
  }
  long padded_row(long t, long row) const { return t * layout_.batch + column(row); }
  long before(long t) const { return layout_.reverse ? t + 1 : t - 1; }

  // In reverse the boundary before step t + 1 is met before step t.
  bool begins(long t, long row) const {
    if (!layout_.reset) return false;
    if (!layout_.reverse) return layout_.reset[padded_row(t, row)];
    return t + 1 < layout_.steps && layout_.reset[padded_row(t + 1, row)];
  }
  bool is_first(long t, long row) const {
    if (begins(t, row)) return true;
    return layout_.reverse ? t == layout_.steps - 1 || rank(row) >= active(t + 1) : t == 0;
  }

  void meet() const {
    if (parts_ > 1) barrier_->wait(static_cast<int>(parts_));
  }

  Range panels(PanelShape shape) const { return share(panel_count<T>(shape), part_, parts_); }

  // The units that a member's panels cover.
  Range units(PanelShape shape) const {
    const Range p = panels(shape);
    const long width = shape.unit_vectors * lanes<T>;
    return {p.begin * width, p.end * width < shape.units ? p.end * width : shape.units};
  }

  // For each of the member's panels and each row: done(row, first unit, tile), the tile holding
  // start + a . panel, `vectors` vectors.
  template <int vectors, class Done>
  THROUGHTIME_INLINE void product(PanelShape shape, const T* packed, const T* start, Rows<T> a, long depth, long count,
                                  Done done) const {
    alignas(64) T tile[block_rows * vectors * lanes<T>];
    alignas(64) const T zero[vectors * lanes<T>] = {};
    const Range p = panels(shape);
    const long size = panel_size<T>(shape, depth), width = shape.unit_vectors * lanes<T>;
    for (long panel = p.begin; panel < p.end; ++panel)
      for (long first = 0; first < count; first += block_rows) {
        const long rows = count - first < block_rows ? count - first : block_rows;
        multiply<T, vectors>(rows, depth, a.at(first), a.stride, packed + panel * size,
                             start ? start + panel * vectors * lanes<T> : zero, tile);
        for (long row = 0; row < rows; ++row) done(first + row, panel * width, tile + row * vectors * lanes<T>);
      }
  }

  static void copy(T* to, const T* from, Range columns) {
    memcpy(to + columns.begin, from + columns.begin, sizeof(T) * (columns.end - columns.begin));
  }

  const Layout& layout_;
  const long groups_, group_, parts_, part_;
  Barrier* const barrier_;
};

// One call: `Worker<T, cell>(call, plan, member, barrier, memory, rows).run()` by each of its threads.
template <class T, class Call, template <class, Cell> class Worker, class Buffers>
struct Run {
  const Call* call;
  T* memory;
  Barrier* barriers;
  void (*work)(const Run&, long member, long members);

  template <Cell cell>
  static void work_on(const Run& run, long member, long members) {
    const Plan p = plan(*run.call, members);
    const long rows = (run.call->batch + p.groups - 1) / p.groups, group = member / p.parts;
    Worker<T, cell>(*run.call, p, member, run.barriers + group, run.memory + group * Buffers::size(*run.call, rows),
                    rows)
        .run();
  }

  static auto choose(Cell cell) {
    switch (cell) {
      case Cell::lstm: return work_on<Cell::lstm>;
      case Cell::gru: return work_on<Cell::gru>;
      case Cell::gru_reset_before: return work_on<Cell::gru_reset_before>;
      case Cell::rnn_relu: return work_on<Cell::rnn_relu>;
      default: return work_on<Cell::rnn_tanh>;
    }
  }

  static bool go(const Call& call) {
    const int threads = useful_threads(call);
    const size_t bytes = sizeof(T) * Buffers::size(call, call.batch + threads), line = 64;
    void* memory = aligned_alloc(line, (bytes + line - 1) / line * line);
    if (!memory) return false;
    memset(memory, 0, bytes);
    Barrier* barriers = new Barrier[threads];
    Run run{&call, static_cast<T*>(memory), barriers, choose(call.cell)};
    run_together(
        threads,
        [](void* context, int member, int members) {
          const Run& it = *static_cast<const Run*>(context);
          it.work(it, member, members);
        },
        &run);
    delete[] barriers;
    free(memory);
    return true;
  }
};

}  // namespace throughtime::THROUGHTIME_ISA
