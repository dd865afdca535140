#include "pass.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <type_traits>

#include "memory.h"
#include "threads.h"

namespace throughtime {
namespace {

long most_rows(const std::vector<Stretch>& stretches) {
  long most = 0;
  for (const Stretch& it : stretches) most = std::max(most, it.last_row - it.first_row);
  return most;
}

// out (rows, width): row ids[i] of table, for each i.
template <class T>
void gather(long rows, long width, const int64_t* ids, const T* table, T* out, int threads) {
  constexpr long worth_sharing = 1 << 16;  // elements
  struct Task {
    long rows, width;
    const int64_t* ids;
    const T* table;
    T* out;
  } task{rows, width, ids, table, out};
  run_together(
      rows * width < worth_sharing ? 1 : threads,
      [](void* context, int member, int members) {
        const auto& it = *static_cast<const Task*>(context);
        for (long i = it.rows * member / members; i < it.rows * (member + 1) / members; ++i)
          memcpy(it.out + i * it.width, it.table + it.ids[i] * it.width, sizeof(T) * it.width);
      },
      &task);
}

// Calls `run` with the next stretch of each pass that has one: of two directions' segments one may have fewer.
template <class Pass, class Run>
Ended for_each_stretch(const Pass* const* passes, int count, bool (*is_interrupted)(), Run run) {
  using Clock = std::chrono::steady_clock;
  constexpr auto between = std::chrono::milliseconds(100);
  auto asked = Clock::now();
  size_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, passes[i]->stretches.size());
  for (size_t number = 0; number < most; ++number) {
    int of[2], running = 0;
    for (int i = 0; i < count; ++i)
      if (number < passes[i]->stretches.size()) of[running++] = i;
    if (!run(number, of, running)) return Ended::out_of_memory;
    if (const auto now = Clock::now(); now - asked > between) {
      if (is_interrupted()) return Ended::interrupted;
      asked = now;
    }
  }
  return Ended::done;
}

// The forward pass's W_ih x, where it has no place among what is kept.
template <class E>
class Scratch {
  using T = Arithmetic<E>;

 public:
  explicit Scratch(const ForwardPass<E>& pass)
      : count_(reads_table(pass) || (std::is_same_v<E, T> && pass.loop.gates)
                   ? 0
                   : most_rows(pass.stretches) * gate_count(pass.loop.cell) * pass.loop.hidden),
        block_(Block::bytes<T>(count_)), x_(block_.is_there() ? block_.take<T>(count_) : nullptr) {}

  // Ids are read by the step itself, but for the cell that writes to W_ih x.
  static bool reads_table(const ForwardPass<E>& pass) { return pass.table && pass.loop.cell != Cell::gru_reset_before; }

  bool is_there() const { return block_.is_there(); }
  T* of(E* gates) const { return count_ ? x_ : reinterpret_cast<T*>(gates); }

 private:
  long count_;
  Block block_;
  T* x_;
};

// Make W_ih x of a stretch, and say what the time loop runs over.
template <class E>
Forward<E> prepare(const Kernels<E>& kernels, const ForwardPass<E>& pass, const Stretch& stretch,
                   const Scratch<E>& scratch) {
  using T = Arithmetic<E>;
  Forward<E> loop = pass.loop;
  const long width = gate_count(loop.cell) * loop.hidden, offset = stretch.first_row - loop.first_row;
  const long rows = stretch.last_row - stretch.first_row;
  loop.begin = stretch.begin;
  loop.end = stretch.end;
  loop.first_row = stretch.first_row;
  if (loop.gates) loop.gates += offset * width;
  if (loop.kept) loop.kept += offset * loop.hidden;
  loop.ids = nullptr;
  if (Scratch<E>::reads_table(pass)) {
    loop.x = const_cast<T*>(pass.table);  // where there are ids, it is only read
    loop.ids = pass.input.ids;
    return loop;
  }
  loop.x = scratch.of(loop.gates);
  if (pass.table)
    gather(rows, width, pass.input.ids + stretch.first_row, pass.table, loop.x, loop.threads);
  else
    kernels.multiply_rows_by(rows, pass.input.width, width, pass.input.rows + stretch.first_row * pass.input.stride,
                             pass.input.stride, pass.weight_ih, loop.x, width, loop.threads);
  return loop;
}

// What one stretch of the backward loop yields for the products after it, each part at the beginning of a cache line. Rows of
// the gates' gradients are kept away from powers of two, where reading down a column would meet the same few sets of the cache.
template <class E>
class Workspace {
  static constexpr long apart = 16;

 public:
  long width, stride;

  explicit Workspace(const BackwardPass<E>& pass)
      : width((pass.loop.cell == Cell::gru ? 4 : gate_count(pass.loop.cell)) * pass.loop.hidden), stride(width + apart),
        sizes_{most_rows(pass.stretches) * stride,
               most_rows(pass.stretches) * (pass.loop.rows || pass.loop.reset ? pass.loop.width() : 0),
               most_rows(pass.stretches) *
                   (pass.loop.cell == Cell::gru_reset_before || pass.loop.projected ? pass.loop.hidden : 0),
               most_rows(pass.stretches) * pass.loop.projected},
        block_(Block::bytes<E>(sizes_[0]) + Block::bytes<E>(sizes_[1]) + Block::bytes<E>(sizes_[2]) +
               Block::bytes<E>(sizes_[3])) {
    if (!is_there()) return;
    for (int i = 0; i < 4; ++i) parts_[i] = block_.template take<E>(sizes_[i]);
  }

  bool is_there() const { return block_.is_there(); }

  void give_to(Backward<E>& loop) const {
    loop.grad_stride = stride;
    loop.grad_gates = parts_[0];
    loop.h_prev = parts_[1];
    loop.extra = parts_[2];
    loop.grad_hidden = parts_[3];
  }

 private:
  long sizes_[4];
  Block block_;
  E* parts_[4];
};

// The products after a stretch of the backward loop, for which `loop` says what it has yielded.
template <class E>
class Sums {
 public:
  Sums(const Kernels<E>& kernels, const BackwardPass<E>& pass, const Backward<E>& loop, const Stretch& stretch)
      : kernels_(kernels), pass_(pass), loop_(loop), stretch_(stretch), rows_(stretch.last_row - stretch.first_row) {}

  bool add() {
    const Cell cell = loop_.cell;
    const long H = loop_.hidden, P = loop_.width(), stride = loop_.grad_stride;
    const E* const da = loop_.grad_gates;
    if (!add_input()) return false;
    if (cell == Cell::gru_reset_before && !outer(da + 2 * H, stride, H, loop_.extra, H, H, pass_.sum_hh + 2 * H * H))
      return false;
    if (loop_.projected && !outer(loop_.grad_hidden, P, P, loop_.extra, H, H, pass_.sum_hr)) return false;
    if (cell == Cell::gru) return add_h(da + H, 3 * H);
    return add_h(da, (cell == Cell::gru_reset_before ? 2 : gate_count(cell)) * H);
  }

 private:
  bool add_input() {
    const Input<E>& input = pass_.input;
    const long width = gate_count(loop_.cell) * loop_.hidden;
    const E* const da = loop_.grad_gates;
    if (input.ids) {
      kernels_.add_by_id(rows_, width, da, loop_.grad_stride, input.ids + stretch_.first_row, pass_.sum_ih, loop_.threads);
      return true;
    }
    const E* const x = input.rows + stretch_.first_row * input.stride;
    if (!outer(da, loop_.grad_stride, width, x, input.stride, input.width, pass_.sum_ih, pass_.sum_bias_ih)) return false;
    if (pass_.grad_input)
      kernels_.multiply_rows_and_round(rows_, width, input.width, da, loop_.grad_stride, pass_.weight_ih,
                                       pass_.grad_input + stretch_.first_row * input.width, input.width, loop_.threads);
    return true;
  }

  // h before each of the stretch's rows: where all rows take part in every step, the output shifted by one.
  bool add_h(const E* da, long width) {
    const long P = loop_.width(), B = loop_.batch;
    if (loop_.rows || loop_.reset)
      return outer(da, loop_.grad_stride, width, loop_.h_prev, P, P, pass_.sum_hh, pass_.sum_bias_hh);
    const long start = loop_.reverse ? loop_.steps - 1 : 0;
    if (stretch_.begin <= start && start < stretch_.end) {
      const E* const first = da + (start - stretch_.begin) * B * loop_.grad_stride;
      if (!outer(B, first, loop_.grad_stride, width, loop_.initial_h, P, P, pass_.sum_hh, pass_.sum_bias_hh)) return false;
    }
    const long begin = loop_.reverse ? stretch_.begin : std::max(stretch_.begin, 1L);
    const long end = loop_.reverse ? std::min(stretch_.end, start) : stretch_.end;
    if (begin >= end) return true;
    const E* const before = loop_.output + (begin + (loop_.reverse ? 1 : -1)) * B * loop_.output_stride;
    const E* const first = da + (begin - stretch_.begin) * B * loop_.grad_stride;
    return outer((end - begin) * B, first, loop_.grad_stride, width, before, loop_.output_stride, P, pass_.sum_hh,
                 pass_.sum_bias_hh);
  }

  bool outer(const E* left, long left_stride, long left_width, const E* right, long right_stride, long right_width,
             Arithmetic<E>* sum, Arithmetic<E>* bias = nullptr) {
    return outer(rows_, left, left_stride, left_width, right, right_stride, right_width, sum, bias);
  }

  bool outer(long rows, const E* left, long left_stride, long left_width, const E* right, long right_stride,
             long right_width, Arithmetic<E>* sum, Arithmetic<E>* bias) {
    return kernels_.add_outer(rows, left_width, right_width, left, left_stride, right, right_stride, sum, bias,
                              loop_.threads);
  }

  const Kernels<E>& kernels_;
  const BackwardPass<E>& pass_;
  const Backward<E>& loop_;
  const Stretch& stretch_;
  const long rows_;
};

}  // namespace

template <class E>
Ended run_forward(const Kernels<E>& kernels, const ForwardPass<E>* const* passes, int count, bool (*is_interrupted)()) {
  std::vector<Scratch<E>> scratch;
  for (int i = 0; i < count; ++i) {
    scratch.emplace_back(*passes[i]);
    if (!scratch[i].is_there()) return Ended::out_of_memory;
  }
  return for_each_stretch(passes, count, is_interrupted, [&](size_t number, const int* of, int running) {
    Forward<E> loops[2];
    for (int i = 0; i < running; ++i)
      loops[i] = prepare(kernels, *passes[of[i]], passes[of[i]]->stretches[number], scratch[of[i]]);
    return kernels.forward(loops, running);
  });
}

template <class E>
Ended run_backward(const Kernels<E>& kernels, const BackwardPass<E>* const* passes, int count, bool (*is_interrupted)()) {
  std::vector<Workspace<E>> work;
  for (int i = 0; i < count; ++i) {
    work.emplace_back(*passes[i]);
    if (!work[i].is_there()) return Ended::out_of_memory;
  }
  return for_each_stretch(passes, count, is_interrupted, [&](size_t number, const int* of, int running) {
    Backward<E> loops[2];
    for (int i = 0; i < running; ++i) {
      const Stretch& stretch = passes[of[i]]->stretches[number];
      loops[i] = passes[of[i]]->loop;
      loops[i].begin = stretch.begin;
      loops[i].end = stretch.end;
      loops[i].first_grad_row = stretch.first_row;
      work[of[i]].give_to(loops[i]);
    }
    if (!kernels.backward(loops, running)) return false;
    for (int i = 0; i < running; ++i)
      if (!Sums<E>(kernels, *passes[of[i]], loops[i], passes[of[i]]->stretches[number]).add()) return false;
    return true;
  });
}

#define THROUGHTIME_PASS(E)                                                                       \
  template Ended run_forward<E>(const Kernels<E>&, const ForwardPass<E>* const*, int, bool (*)()); \
  template Ended run_backward<E>(const Kernels<E>&, const BackwardPass<E>* const*, int, bool (*)());
THROUGHTIME_PASS(float)
THROUGHTIME_PASS(double)
THROUGHTIME_PASS(Bf16)
#undef THROUGHTIME_PASS

}  // namespace throughtime
