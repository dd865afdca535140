// Many losses carried back through time at once, for the lag matrix. Batch rows never meet, and neither do losses: a task
// takes some losses of one row of the batch, and keeps their stack in the cache for all its steps.
#include "cotangents.h"

#include "dense.h"
#include "memory.h"

namespace throughtime::THROUGHTIME_ISA {
namespace {

constexpr long most_losses = 48;  // of a task: two whole tiles for each height, and tasks enough to go round

template <class T>
class Sweep {
 public:
  static bool go(const Cotangents<T>& s) {
    Sweep sweep(s);
    sweep.workspace_ = static_cast<T*>(scratch_memory(sizeof(T) * s.threads * sweep.workspace_size()));
    if (!sweep.workspace_) return false;
    run_tasks(
        s.threads, s.batch * sweep.blocks_,
        [](void* it, long task, int member) { static_cast<const Sweep*>(it)->carry(task, member); }, &sweep);
    return true;
  }

 private:
  using V = Vector<T>;
  static constexpr long W = lanes<T>;

  explicit Sweep(const Cotangents<T>& s) : s_(s), blocks_((s.losses + most_losses - 1) / most_losses) {}

  // h, c, W_hh^T da and da of a task's losses.
  long workspace_size() const { return most_losses * (s_.gates + 3) * s_.hidden; }

  void carry(long task, int member) const {
    const long H = s_.hidden, b = task % s_.batch;
    const long part = task / s_.batch;
    const Range block = share(s_.losses, s_.reverse ? part : blocks_ - 1 - part, blocks_);  // those that go far first
    T* const h = workspace_ + member * workspace_size();
    T* const c = h + most_losses * H;
    for (long i = 0; i < 2 * most_losses * H; ++i) h[i] = 0;
    const long first = s_.loss_steps[block.begin], last = s_.loss_steps[block.end - 1], reach = s_.lags - 1;
    if (s_.reverse) {
      for (long t = first; t < s_.steps && t <= last + reach; ++t) step(t, b, block, t - reach, t, h, c);
    } else {
      for (long t = last; t >= 0 && t >= first - reach; --t) step(t, b, block, t, t + reach, h, c);
    }
  }

  // Carry the losses of steps low ... high over step t.
  void step(long t, long b, Range block, long low, long high, T* h, T* c) const {
    const long H = s_.hidden, width = s_.gates * H, at = t * s_.batch + b;
    T* const product = c + most_losses * H;
    T* const gates = product + most_losses * H;
    long begin = block.begin, end = block.end;
    while (begin < end && s_.loss_steps[begin] < low) ++begin;
    while (end > begin && s_.loss_steps[end - 1] > high) --end;
    if (begin == end) return;
    for (long s = begin; s < end; ++s) {
      const long row = s - block.begin, lag = s_.reverse ? t - s_.loss_steps[s] : s_.loss_steps[s] - t;
      T *const h_row = h + row * H, *const c_row = c + row * H, *const a_row = gates + row * width;
      if (lag == 0)
        for (long j = 0; j < H; ++j) h_row[j] += s_.grad_output[at * H + j];
      const double sum = squares(h_row) + (s_.c_to_c ? squares(c_row) : 0);
      s_.norms[(s * s_.lags + lag) * s_.batch + b] = static_cast<T>(__builtin_sqrt(sum));
      for (long j = 0; j < H; j += W) over_factors(at, j, h_row + j, c_row + j, a_row + j);
    }
    const long row = begin - block.begin;
    RowProduct<T, T>{end - begin, width, H, gates + row * width, width, {s_.weight_hh, nullptr, 0}, product, H}.part(
        {0, end - begin}, {0, panel_count<T>({1, 4, H})});
    for (long i = 0; i < (end - begin) * H; ++i) h[row * H + i] += product[i];
  }

  // One vector of units: da, dc' and what of dh goes past the weights.
  THROUGHTIME_INLINE void over_factors(long at, long j, T* h, T* c, T* a) const {
    const long H = s_.hidden, n = H - j;
    const V dh = load(h, n), dc = s_.c_to_c ? load(c, n) : V{};
    for (long g = 0; g < s_.gates; ++g) {
      const long factor = (at * s_.gates + g) * H + j;
      V da = dh * load(s_.h_to_a + factor, n);
      if (s_.c_to_c) da += dc * load(s_.c_to_a + factor, n);
      store(a + g * H, da, n);
    }
    if (s_.c_to_c) store(c, dh * load(s_.h_to_c + at * H + j, n) + dc * load(s_.c_to_c + at * H + j, n), n);
    store(h, s_.h_to_h ? dh * load(s_.h_to_h + at * H + j, n) : V{}, n);
  }

  // In double: a float's square vanishes long before the float does.
  double squares(const T* row) const {
    double sum[8] = {};
    long j = 0;
    for (; j + 8 <= s_.hidden; j += 8)
      for (long l = 0; l < 8; ++l) sum[l] += static_cast<double>(row[j + l]) * row[j + l];
    for (; j < s_.hidden; ++j) sum[0] += static_cast<double>(row[j]) * row[j];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }

  const Cotangents<T>& s_;
  const long blocks_;
  T* workspace_ = nullptr;
};

}  // namespace

bool cotangent_norms(const Cotangents<float>& s) { return Sweep<float>::go(s); }
bool cotangent_norms(const Cotangents<double>& s) { return Sweep<double>::go(s); }

}  // namespace throughtime::THROUGHTIME_ISA
