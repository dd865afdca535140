// What every time loop has in common: how a call's threads divide its work, which rows and columns are a member's, and how both
// passes go through the steps.
//
// A call's threads are cut in groups; each group has rows of its own and never meets another. Where there are too few
// rows for that, the members of a group share its rows and divide the hidden units (panels of packed weights) between
// them, and meet at a barrier in each step. All of a member's loops say which: `rows` are its group's, panels are its
// own. Two directions at once are two calls, whose threads don't meet either: with rows enough both have groups in one
// queue, else each has a team of its own.
#pragma once

#include <cstdlib>
#include <cstring>

#include "dense.h"
#include "memory.h"
#include "product.h"
#include "request.h"
#include "threads.h"

namespace throughtime::THROUGHTIME_ISA {

template <class E>
inline long packed_size(PanelShape shape, long depth) {
  return panel_count<E>(shape) * panel_size<E>(shape, depth);
}

template <class E>
struct PackTask {
  PanelShape shape;
  long depth;
  const Arithmetic<E>* source;
  long unit_stride, depth_stride;
  E* packed;
};

template <class E>
inline void pack(const PackTask<E>& task, int threads) {
  if (panel_size<E>(task.shape, task.depth) * panel_count<E>(task.shape) < 65536) threads = 1;
  run_together(
      threads,
      [](void* context, int member, int members) {
        const auto& t = *static_cast<const PackTask<E>*>(context);
        const Range p = share(panel_count<E>(t.shape), member, members);
        pack_panels<E>(t.shape, t.depth, t.source, t.unit_stride, t.depth_stride, p.begin, p.end, t.packed);
      },
      const_cast<PackTask<E>*>(&task));
}

// How a call's threads divide its work.
struct Division {
  long groups, parts;
};

inline bool has_rows_for(const Layout& s, long members) {
  constexpr long few = 4;  // rows for which reading all weights costs a thread more than meeting the others
  return s.batch >= few * members;
}

constexpr long most_groups_a_thread = 4;

// Groups of one member each: more than there are threads, for whoever is done first, as long as each has rows enough to
// pay for reading the weights.
inline Division in_groups(const Layout& s, long threads) {
  constexpr long enough = 16;
  const long steps = s.end - s.begin, last = s.end - 1;
  const long rows = s.rows ? s.first_row[last] + s.rows[last] - s.first_row[s.begin] : steps * s.batch;
  long groups = threads;
  while (threads > 1 && groups < most_groups_a_thread * threads && rows >= 2 * groups * enough * steps) groups *= 2;
  return {groups, 1};
}

inline Division sharing(const Layout& s, long members) {
  long groups = members;
  while (groups > 1 && (!has_rows_for(s, groups) || members % groups)) --groups;
  return {groups, members / groups};
}

// The most groups that a call may have: whoever needs memory for each of them asks here.
inline long most_groups(const Layout& s) { return most_groups_a_thread * s.threads; }

// How many of all threads one of `calls` can have for itself, at least one.
inline int team(int threads, int calls) { return (threads + calls - 1) / calls; }

// One thread a call where a step is too small to share, since meeting would cost more than it saves, and one for all of
// them where there is too little to do. It changes no bit.
inline int useful_threads(const Layout& s, int calls) {
  const long multiplications = s.batch * s.hidden * s.width() * s.gate_count;
  if (calls * (s.end - s.begin) * multiplications < 50000) return 1;
  const bool meets = !has_rows_for(s, team(s.threads, calls));
  return meets && multiplications < 20000 && s.threads > calls ? calls : s.threads;
}

// Rows of activations, private to a group and away from powers of two, where the cache's sets would collide.
template <class E>
struct Rows {
  E* data = nullptr;
  long stride = 0;

  E* at(long row) const { return data + row * stride; }
};

// A member's rows in an array: a stride apart, or where an index says. It is copied before a loop over them, for to a compiler
// what the loop stores might be its own members, which it would read again after each store.
template <class T>
struct Places {
  T* first;
  long stride;
  const int64_t* index;
  long index_stride;

  THROUGHTIME_INLINE T* at(long row) const { return first + (index ? index[row * index_stride] : row) * stride; }
};

// Hands out rows of memory, or, from null, counts its bytes.
class Memory {
 public:
  explicit Memory(char* at) : at_(at) {}

  template <class E>
  Rows<E> rows(long count, long columns) {
    constexpr long W = lanes<E>;
    const long stride = (columns + W - 1) / W * W + 64 / sizeof(E);
    const Rows<E> taken{at_ ? reinterpret_cast<E*>(at_ + bytes_) : nullptr, stride};
    bytes_ += count * stride * sizeof(E);
    return taken;
  }

  long bytes() const { return bytes_; }

 private:
  char* at_;
  long bytes_ = 0;
};

// What forward and backward have in common: which rows and columns are a member's, and how they are addressed.
template <class E>
class Member {
  using T = Arithmetic<E>;

 public:
  Member(const Layout& s, Division division, long member, Barrier* barrier)
      : layout_(s), groups_(division.groups), group_(member / division.parts), parts_(division.parts), part_(member % division.parts),
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
  long output_row(long t, long row) const { return layout_.is_packed ? packed_row(t, row) : padded_row(t, row); }
  long before(long t) const { return layout_.reverse ? t + 1 : t - 1; }

  // The rows of a step in an array of packed ones, so wide, that begins at one of them; or in one of outputs, so far apart.
  template <class A>
  Places<A> packed_places(A* array, long t, long first_row, long width) const {
    return {array + (packed_row(t, 0) - first_row) * width, groups_ * width, nullptr, 0};
  }
  template <class A>
  Places<A> output_places(A* array, long t, long stride) const {
    if (layout_.order && !layout_.is_packed)
      return {array + t * layout_.batch * stride, stride, layout_.order + group_, groups_};
    return {array + output_row(t, 0) * stride, groups_ * stride, nullptr, 0};
  }

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

  Range panels(PanelShape shape) const { return share(panel_count<E>(shape), part_, parts_); }

  // The units that a member's panels cover.
  Range units(PanelShape shape) const {
    const Range p = panels(shape);
    const long width = shape.unit_vectors * lanes<E>;
    return {p.begin * width, p.end * width < shape.units ? p.end * width : shape.units};
  }

  // For each of the member's panels and each row: done(row, first unit, tile), the tile holding
  // start + a . panel, `vectors` vectors.
  template <int vectors, class Done>
  THROUGHTIME_INLINE void product(PanelShape shape, const Weight<E>& weight, const T* start, Rows<E> a, long depth,
                                  long count, Done done) const {
    alignas(64) T tile[block_rows * vectors * lanes<T>];
    alignas(64) const T zero[vectors * lanes<T>] = {};
    const Range p = panels(shape);
    const long width = shape.unit_vectors * lanes<T>;
    for (long panel = p.begin; panel < p.end; ++panel)
      for (long first = 0; first < count; first += block_rows) {
        const long rows = count - first < block_rows ? count - first : block_rows;
        multiply_panel<E, vectors>(shape, panel, rows, depth, a.at(first), a.stride, weight,
                                   start ? start + panel * vectors * lanes<T> : zero, tile);
        for (long row = 0; row < rows; ++row) done(first + row, panel * width, tile + row * vectors * lanes<T>);
      }
  }

  // For each of the member's units of `columns` and each row: done(row, unit, start + a . weight).
  template <class Done>
  THROUGHTIME_INLINE void unit_product(long columns, const Weight<E>& weight, const T* start, Rows<E> a, long depth,
                                       long count, Done done) const {
    constexpr long W = lanes<T>;
    product<4>(plain_panels(columns), weight, start, a, depth, count,
               [&](long row, long first, const T* tile) __attribute__((always_inline)) {
                 for (long unit = first; unit < first + 4 * W && unit < columns; unit += W)
                   done(row, unit, load(tile + unit - first));
               });
  }

  template <class To, class From>
  static void copy(To* to, const From* from, Range columns) {
    for (long j = columns.begin; j < columns.end; j += lanes<E>)
      store(to + j, load(from + j, columns.end - j), columns.end - j);
  }

  const Layout& layout_;
  const long groups_, group_, parts_, part_;
  Barrier* const barrier_;
};

// The forward pass through a call's steps. `Own` is the loop of a cell: begin_step(i) of the i-th step, step(t, count) for its
// first `count` rows, enter(row, h, c) for a row that takes up a state, leave(row) for one that leaves it.
//
// What crosses between the members of a group is only h, which is kept twice, this step's and the next one's, so one meeting
// in a step is enough for most cells.
template <class E, class Own>
class ForwardLoop : protected Member<E> {
  using Base = Member<E>;

 public:
  void run() {
    long count = 0;
    for (long i = 0; i < s_.end - s_.begin; ++i) {
      const long t = s_.reverse ? s_.end - 1 - i : s_.begin + i;
      const bool is_last = i + 1 == s_.end - s_.begin;
      const long previous = count;
      count = Base::mine(Base::active(t));
      const long next = is_last ? 0 : Base::mine(Base::active(s_.reverse ? t - 1 : t + 1));
      own().begin_step(i);
      if (prepare(t, previous, count)) Base::meet();
      own().step(t, count);
      Base::meet();
      for (long row = next; row < count; ++row) own().leave(row);
    }
  }

 protected:
  ForwardLoop(const ForwardCall<E>& s, Division division, long member, Barrier* barrier) : Base(s, division, member, barrier), s_(s) {}

  const ForwardCall<E>& s_;

 private:
  Own& own() { return static_cast<Own&>(*this); }

  // Rows that join take up the carried state, rows that begin a new sequence the initial one.
  bool prepare(long t, long previous, long count) {
    bool has_changed = previous < count;
    for (long row = previous; row < count; ++row) own().enter(row, s_.h, s_.c);
    if (!s_.reset) return has_changed;
    for (long row = 0; row < count; ++row)
      if (Base::begins(t, row)) own().enter(row, s_.initial_h, s_.initial_c), has_changed = true;
    return has_changed;
  }
};

// The backward pass: begin_step(i), step(t, count), and end_step(count, whether it was the call's last). `dh` and `dc` are the
// gradient of the state after a step on entry, before it on return; da crosses between members, and is kept twice.
template <class E, class Own, bool has_c>
class BackwardLoop : protected Member<E> {
  using Base = Member<E>;

 protected:
  using T = Arithmetic<E>;
  using V = Vector<T>;
  using Base::column, Base::packed_row, Base::output_row;

 public:
  void run() {
    long count = 0;
    for (long i = 0; i < s_.end - s_.begin; ++i) {
      const long t = s_.reverse ? s_.begin + i : s_.end - 1 - i;
      const bool is_last = i + 1 == s_.end - s_.begin;
      const long previous = count;
      count = Base::mine(Base::active(t));
      const long next = is_last ? 0 : Base::mine(Base::active(s_.reverse ? t + 1 : t - 1));
      own().begin_step(i);
      for (long row = previous; row < count; ++row) enter(row);
      own().step(t, count);
      if (s_.reset) begin_anew(t, count);
      for (long row = next; row < count; ++row) leave(row);
      own().end_step(count, is_last);
    }
  }

 protected:
  BackwardLoop(const BackwardCall<E>& s, Division division, long member, Barrier* barrier, Rows<T> dh, Rows<T> dc)
      : Base(s, division, member, barrier), s_(s), dh_(dh), dc_(dc), own_h_(Base::units(plain_panels(s.width()))),
        own_(Base::units(plain_panels(s.hidden))) {}

  void end_step(long, bool) {}

  long grad_row(long t, long row) const { return packed_row(t, row) - s_.first_grad_row; }
  long row_of(long t, long row) const { return packed_row(t, row) - s_.first_kept_row; }
  const E* kept(long t, long row) const { return s_.kept + row_of(t, row) * s_.hidden; }
  E* grad_ih(long t, long row) const { return s_.grad_ih + grad_row(t, row) * s_.grad_stride; }
  E* extra(long t, long row) const { return s_.extra + grad_row(t, row) * s_.hidden; }
  const E* h_before(long t, long row) const {
    if (Base::is_first(t, row)) return s_.initial_h + column(row) * s_.width();
    return s_.output + output_row(Base::before(t), row) * s_.output_stride;
  }
  const E* c_before(long t, long row) const {
    if (Base::is_first(t, row)) return s_.initial_c + column(row) * s_.hidden;
    return kept(Base::before(t), row);
  }
  const E* own_loss(long t, long row) const {
    return s_.grad_output ? s_.grad_output + output_row(t, row) * s_.output_stride : nullptr;
  }

  const BackwardCall<E>& s_;
  const Rows<T> dh_, dc_;
  const Range own_h_, own_;

 private:
  Own& own() { return static_cast<Own&>(*this); }

  void enter(long row) {
    Base::copy(dh_.at(row), s_.grad_h + column(row) * s_.width(), own_h_);
    if constexpr (has_c) Base::copy(dc_.at(row), s_.grad_c + column(row) * s_.hidden, own_);
  }

  void leave(long row) {
    Base::copy(s_.grad_h + column(row) * s_.width(), dh_.at(row), own_h_);
    if constexpr (has_c) Base::copy(s_.grad_c + column(row) * s_.hidden, dc_.at(row), own_);
  }

  // The state before a sequence's first step was the initial one: its gradient goes there and nothing goes further.
  void begin_anew(long t, long count) {
    for (long row = 0; row < count; ++row) {
      if (!Base::begins(t, row)) continue;
      move(s_.grad_initial_h + column(row) * s_.width(), dh_.at(row), own_h_);
      if constexpr (has_c) move(s_.grad_initial_c + column(row) * s_.hidden, dc_.at(row), own_);
    }
  }

  static void move(T* to, T* from, Range columns) {
    for (long j = columns.begin; j < columns.end; ++j) to[j] += from[j], from[j] = T(0);
  }
};

// Some calls of the same size: `Loop(call, division, member, barrier, memory, rows).run()` by each of a call's threads, with
// `Buffers(call, memory, rows)` for each group of them, where Loop is that of the call's cell.
template <class Call, class Buffers, class... Loops>
struct Run {
  using Work = void (*)(const Run&, int call, Division, long member);

  const Call* calls;
  int count;
  char* memory;
  long call_bytes;  // of memory
  Barrier* barriers;
  Work work;
  Division of_groups;

  template <class Loop>
  static void work_on(const Run& run, int number, Division p, long member) {
    const Call& call = run.calls[number];
    const long rows = (call.batch + p.groups - 1) / p.groups, group = member / p.parts;
    const Memory memory(run.memory + number * run.call_bytes + group * bytes(call, rows));
    Barrier* barrier = run.barriers + number * run.of_groups.groups + group;
    Loop(call, p, member, barrier, memory, rows).run();
  }

  static Work choose(int cell) {
    static constexpr Work all[] = {work_on<Loops>...};
    return all[cell];
  }

  // What a group's buffers take, in whole cache lines.
  static long bytes(const Call& call, long rows) {
    Memory memory(nullptr);
    Buffers(call, memory, rows);
    return (memory.bytes() + 63) / 64 * 64;
  }

  // A team for each call: member by member in turns.
  void work_in_teams(int member, int members) const {
    if (members < count) {
      for (int number = member; number < count; number += members) work(*this, number, Division{1, 1}, 0);
      return;
    }
    const int number = member % count, team = (members - number + count - 1) / count;
    work(*this, number, sharing(calls[number], team), member / count);
  }

  static bool go(const Call* calls, int count) {
    const Call& one = calls[0];
    const int threads = useful_threads(one, count), team_size = team(threads, count);
    // As many groups of each call as if it were alone: of two directions one may meet long rows where the other meets none.
    const bool is_apart = has_rows_for(one, threads);
    const Division p = is_apart ? in_groups(one, threads) : Division{team_size, 1};  // at most: fewer threads may come
    // Each group rounds up rows and lines, and has what doesn't depend on rows.
    const long call_bytes = bytes(one, one.batch + p.groups) + p.groups * (bytes(one, 0) + 64);
    void* memory = scratch_memory(count * call_bytes);
    if (!memory) return false;
    memset(memory, 0, count * call_bytes);
    Barrier* barriers = new Barrier[count * p.groups];
    Run run{calls, count, static_cast<char*>(memory), call_bytes, barriers, choose(one.cell), p};
    if (is_apart)
      run_tasks(
          threads, count * p.groups,
          [](void* context, long task, int) {
            const Run& it = *static_cast<const Run*>(context);
            it.work(it, static_cast<int>(task % it.count), it.of_groups, task / it.count);
          },
          &run);
    else
      run_together(
          threads,
          [](void* context, int member, int members) {
            static_cast<const Run*>(context)->work_in_teams(member, members);
          },
          &run);
    delete[] barriers;
    return true;
  }
};

}  // namespace throughtime::THROUGHTIME_ISA
