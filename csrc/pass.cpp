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

template <class T>
void put(T* to, const T* from, long count) {
  memcpy(to, from, sizeof(T) * count);
}
// Numbers that bfloat16 holds: a table of rounded weights.
void put(Bf16* to, const float* from, long count) {
  for (long i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, from + i, sizeof bits);
    to[i].bits = static_cast<uint16_t>(bits >> 16);
  }
}

// out (rows, width): row ids[i] of table, for each i.
template <class T, class Out>
void gather(long rows, long width, const int64_t* ids, const T* table, Out* out, int threads) {
  constexpr long worth_sharing = 1 << 16;  // elements
  struct Task {
    long rows, width;
    const int64_t* ids;
    const T* table;
    Out* out;
  } task{rows, width, ids, table, out};
  run_together(
      rows * width < worth_sharing ? 1 : threads,
      [](void* context, int member, int members) {
        const auto& it = *static_cast<const Task*>(context);
        for (long i = it.rows * member / members; i < it.rows * (member + 1) / members; ++i)
          put(it.out + i * it.width, it.table + it.ids[i] * it.width, it.width);
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

template <class E>
bool is_normalised(const std::optional<Variant<E>>& variant) {
  return variant && variant->is_normalised();
}

// What the forward loop needs in a stretch and nobody keeps: W_ih x, and the gates of a variant.
template <class E>
class Scratch {
  using T = Arithmetic<E>;

 public:
  explicit Scratch(const ForwardPass<E>& pass)
      : sizes_{has_gates(pass) ? size(pass) : 0, is_normalised(pass.variant) && !pass.loop.w ? size(pass) : 0,
               has_x(pass) ? size(pass) : 0},
        block_(Block::bytes<E>(sizes_[0]) + Block::bytes<E>(sizes_[1]) + Block::bytes<T>(sizes_[2])) {
    if (!is_there()) return;
    gates_ = block_.template take<E>(sizes_[0]);
    w_ = block_.template take<E>(sizes_[1]);
    x_ = block_.template take<T>(sizes_[2]);
  }

  // Ids are read by the step itself, unless W_ih x is normalised, or written to.
  static bool reads_table(const ForwardPass<E>& pass) {
    return pass.table && !is_normalised(pass.variant) && (pass.variant || !pass.loop.has_last());
  }

  bool is_there() const { return block_.is_there(); }

  void give_to(ForwardCall<E>& loop) const {
    if (gates_) loop.gates = gates_;
    if (w_) loop.w = w_;
    loop.x = x_ ? x_ : reinterpret_cast<T*>(loop.gates);
  }

 private:
  static long size(const ForwardPass<E>& pass) {
    return most_rows(pass.stretches) * pass.loop.gate_count * pass.loop.hidden;
  }
  static bool has_gates(const ForwardPass<E>& pass) { return pass.variant && !pass.loop.gates; }
  static bool has_x(const ForwardPass<E>& pass) {
    const bool has_place = std::is_same_v<E, T> && (pass.loop.gates || has_gates(pass));
    return !is_normalised(pass.variant) && !reads_table(pass) && !has_place;
  }

  long sizes_[3];
  Block block_;
  E *gates_ = nullptr, *w_ = nullptr;
  T* x_ = nullptr;
};

// Make W_ih x of a stretch's rows.
template <class E, class Out>
void multiply_input(void (*multiply)(long, long, long, const E*, long, const Weight<E>&, Out*, long, int), const ForwardPass<E>& pass,
                    const Stretch& stretch, Out* out) {
  const long width = pass.loop.gate_count * pass.loop.hidden, rows = stretch.last_row - stretch.first_row;
  const Input<E>& input = pass.input;
  if (pass.table)
    gather(rows, width, input.ids + stretch.first_row, pass.table, out, pass.loop.threads);
  else
    multiply(rows, input.width, width, input.rows + stretch.first_row * input.stride, input.stride, pass.weight_ih, out, width,
             pass.loop.threads);
}

// Make W_ih x of a stretch, and say what the time loop runs over.
template <class E>
ForwardCall<E> prepare(const Kernels<E>& kernels, const ForwardPass<E>& pass, const Stretch& stretch,
                       const Scratch<E>& scratch) {
  ForwardCall<E> loop = pass.loop;
  const long width = loop.gate_count * loop.hidden, offset = stretch.first_row - loop.first_kept_row;
  loop.variant = pass.variant ? &*pass.variant : nullptr;
  loop.begin = stretch.begin;
  loop.end = stretch.end;
  loop.first_kept_row = stretch.first_row;
  for (E** const array : {&loop.gates, &loop.w, &loop.u})
    if (*array) *array += offset * width;
  if (loop.kept) loop.kept += offset * loop.hidden;
  if (loop.norms) loop.norms += offset * 2 * loop.facts.norms();
  scratch.give_to(loop);
  loop.ids = nullptr;
  if (Scratch<E>::reads_table(pass)) {
    loop.x = const_cast<Arithmetic<E>*>(pass.table);  // where there are ids, it is only read
    loop.ids = pass.input.ids;
  } else if (is_normalised(pass.variant)) {
    multiply_input(kernels.multiply_rows_and_round, pass, stretch, loop.w);
  } else {
    multiply_input(kernels.multiply_rows_by, pass, stretch, loop.x);
  }
  return loop;
}

// Where all rows take part in every step, the output tells what h was before it.
template <class E>
bool has_h_in(const BackwardPass<E>& pass) {
  return pass.variant || pass.loop.rows || pass.loop.reset;
}

// What one stretch of the backward loop yields for the products after it, each part at the beginning of a cache line. Rows of
// the gates' gradients are kept away from powers of two, where reading down a column would meet the same few sets of the cache.
template <class E>
class Workspace {
  static constexpr long gap = 16;

 public:
  explicit Workspace(const BackwardPass<E>& pass)
      : is_variant_(pass.variant), stride_(width(pass) + gap),
        sizes_{rows(pass) * stride_, has_own_hh(pass) ? rows(pass) * stride_ : 0, has_h_in(pass) ? rows(pass) * pass.loop.width() : 0,
               pass.loop.has_last() || pass.loop.projected ? rows(pass) * pass.loop.hidden : 0,
               rows(pass) * pass.loop.projected},
        block_(bytes()) {
    if (!is_there()) return;
    for (int i = 0; i < 5; ++i) parts_[i] = block_.template take<E>(sizes_[i]);
  }

  bool is_there() const { return block_.is_there(); }

  void give_to(BackwardCall<E>& loop) const {
    loop.grad_stride = stride_;
    loop.grad_ih = parts_[0];
    loop.grad_hh = parts_[1] ? parts_[1] : is_variant_ ? parts_[0] : parts_[0] + loop.facts.offset_hh * loop.hidden;
    loop.h_in = parts_[2];
    loop.extra = parts_[3];
    loop.grad_hidden = parts_[4];
  }

 private:
  static long rows(const BackwardPass<E>& pass) { return most_rows(pass.stretches); }
  static long width(const BackwardPass<E>& pass) {
    return (pass.loop.gate_count + (pass.variant ? 0 : pass.loop.facts.offset_hh)) * pass.loop.hidden;
  }
  static bool has_own_hh(const BackwardPass<E>& pass) {
    return pass.variant && (is_normalised(pass.variant) || pass.loop.facts.offset_hh);
  }
  size_t bytes() const {
    size_t all = 0;
    for (const long size : sizes_) all += Block::bytes<E>(size);
    return all;
  }

  bool is_variant_;
  long stride_, sizes_[5];
  Block block_;
  E* parts_[5];
};

// The products after a stretch of the backward loop, for which `loop` says what it has yielded.
template <class E>
class Sums {
 public:
  Sums(const Kernels<E>& kernels, const BackwardPass<E>& pass, const BackwardCall<E>& loop, const Stretch& stretch)
      : kernels_(kernels), pass_(pass), loop_(loop), stretch_(stretch), rows_(stretch.last_row - stretch.first_row) {}

  bool add() {
    const long H = loop_.hidden, P = loop_.width(), joint = loop_.joint() * H;
    if (!add_input()) return false;
    if (loop_.has_last() && !outer(loop_.grad_hh + joint, loop_.grad_stride, H, loop_.extra, H, H, pass_.sum_hh + joint * H))
      return false;
    if (loop_.projected && !outer(loop_.grad_hidden, P, P, loop_.extra, H, H, pass_.sum_hr)) return false;
    return add_h(loop_.grad_hh, joint);
  }

 private:
  bool add_input() {
    const Input<E>& input = pass_.input;
    const long width = loop_.gate_count * loop_.hidden, turned = pass_.variant ? 0 : loop_.facts.turned * loop_.hidden;
    if (!add_gates(0, width - turned, turned)) return false;
    if (turned && !add_gates(width - turned, turned, 0)) return false;
    if (pass_.grad_input)
      kernels_.multiply_rows_and_round(rows_, width, input.width, loop_.grad_ih, loop_.grad_stride, pass_.weight_ih,
                                       pass_.grad_input + stretch_.first_row * input.width, input.width, loop_.threads);
    return true;
  }

  // So many columns of the rows, from one on, belong to the gates' rows of W_ih from another on.
  bool add_gates(long column, long count, long row) {
    const Input<E>& input = pass_.input;
    const E* const da = loop_.grad_ih + column;
    if (input.ids) {
      kernels_.add_by_id(rows_, count, da, loop_.grad_stride, input.ids + stretch_.first_row, pass_.sum_ih + row,
                         loop_.gate_count * loop_.hidden, loop_.threads);
      return true;
    }
    return outer(da, loop_.grad_stride, count, input.rows + stretch_.first_row * input.stride, input.stride, input.width,
                 pass_.sum_ih + row * input.width, pass_.sum_bias_ih ? pass_.sum_bias_ih + row : nullptr);
  }

  // h before each of the stretch's rows: where all rows take part in every step, the output shifted by one.
  bool add_h(const E* da, long width) {
    const long P = loop_.width(), B = loop_.batch;
    if (has_h_in(pass_))
      return outer(da, loop_.grad_stride, width, loop_.h_in, P, P, pass_.sum_hh, pass_.sum_bias_hh);
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
  const BackwardCall<E>& loop_;
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
    ForwardCall<E> loops[2];
    for (int i = 0; i < running; ++i)
      loops[i] = prepare(kernels, *passes[of[i]], passes[of[i]]->stretches[number], scratch[of[i]]);
    return (loops[0].variant ? kernels.forward_variant : kernels.forward)(loops, running);
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
    BackwardCall<E> loops[2];
    for (int i = 0; i < running; ++i) {
      const Stretch& stretch = passes[of[i]]->stretches[number];
      loops[i] = passes[of[i]]->loop;
      loops[i].variant = passes[of[i]]->variant ? &*passes[of[i]]->variant : nullptr;
      loops[i].begin = stretch.begin;
      loops[i].end = stretch.end;
      loops[i].first_grad_row = stretch.first_row;
      work[of[i]].give_to(loops[i]);
    }
    if (!(loops[0].variant ? kernels.backward_variant : kernels.backward)(loops, running)) return false;
    for (int i = 0; i < running; ++i)
      if (!Sums<E>(kernels, *passes[of[i]], loops[i], passes[of[i]]->stretches[number]).add()) return false;
    return true;
  });
}

std::vector<Saved> saved(const Facts& facts, int gates, bool is_variant, bool is_normalised) {
  std::vector<Saved> all;
  if (is_variant || facts.saves_gates) all.push_back({"gates", gates, 0, false});
  if (facts.keeps) all.push_back({"kept", 1, 0, false});
  if (is_normalised) {
    all.push_back({"w", gates, 0, false});
    all.push_back({"u", gates, 0, false});
    all.push_back({"norms", 0, 2 * facts.norms(), true});
  }
  return all;
}

template <class T>
void add_up(const Layout& s, long groups, const T* sums, const VariantSums<T>& to) {
  const long G = s.gate_count, H = s.hidden, rows = sum_rows(s), stride = sum_stride(s);
  // `count` gates of an array, whose sums stand in as many rows from one on.
  const auto add = [&](T* out, long row, long count) {
    if (!out) return;
    memset(out, 0, sizeof(T) * count * H);
    for (long group = 0; group < groups; ++group)
      for (long k = 0; k < count; ++k)
        for (long j = 0; j < H; ++j) out[k * H + j] += sums[(group * rows + row + k) * stride + j];
  };
  add(to.bias_ih, 0, G);
  add(to.bias_hh, 0, G);
  if (to.bias_hh && s.facts.offset_hh) add(to.bias_hh + (G - 1) * H, G, 1);
  add(to.gain_ih, G + 1, G);
  add(to.gain_hh, 2 * G + 1, G);
  add(to.gain_c, 3 * G + 1, 1);
  add(to.shift_c, 3 * G + 2, 1);
  add(to.weight_ch, 3 * G + 3, G - 1);
}
template void add_up(const Layout&, long, const float*, const VariantSums<float>&);
template void add_up(const Layout&, long, const double*, const VariantSums<double>&);

#define THROUGHTIME_PASS(E)                                                                       \
  template Ended run_forward<E>(const Kernels<E>&, const ForwardPass<E>* const*, int, bool (*)()); \
  template Ended run_backward<E>(const Kernels<E>&, const BackwardPass<E>* const*, int, bool (*)());
THROUGHTIME_PASS(float)
THROUGHTIME_PASS(double)
THROUGHTIME_PASS(Bf16)
#undef THROUGHTIME_PASS

}  // namespace throughtime
