#include "threads.h"

#include <dlfcn.h>

#include <chrono>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace throughtime {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();
};

// GOMP_parallel is the stable entry point of GCC's runtime, and LLVM's has it too.
const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp o{};
#if defined(__SANITIZE_THREAD__)
    return o;  // the runtime isn't instrumented, so what it orders would be taken for races
#endif
    o.parallel = reinterpret_cast<decltype(o.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    o.thread = reinterpret_cast<decltype(o.thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    o.threads = reinterpret_cast<decltype(o.threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    if (!o.thread || !o.threads) o.parallel = nullptr;
    return o;
  }();
  return found;
}

using Clock = std::chrono::steady_clock;
constexpr Clock::duration moment = std::chrono::milliseconds(100);
std::atomic<Clock::rep> last_crowded{0};

struct Work {
  void (*body)(void*, int, int);
  void* context;
};

}  // namespace

void run_together(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return body(context, 0, 1);
  if (openmp().parallel) {
    Work work{body, context};
    return openmp().parallel(
        [](void* w) {
          auto* it = static_cast<Work*>(w);
          it->body(it->context, openmp().thread(), openmp().threads());
        },
        &work, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> others;
  for (int member = 1; member < threads; ++member) others.emplace_back(body, context, member, threads);
  body(context, 0, threads);
  for (auto& other : others) other.join();
}

void run_tasks(int threads, long tasks, void (*body)(void*, long, int), void* context) {
  struct Queue {
    void (*body)(void*, long, int);
    void* context;
    long tasks;
    std::atomic<long> next{0};
  } queue{body, context, tasks};
  run_together(
      threads < tasks ? threads : static_cast<int>(tasks),
      [](void* q, int member, int) {
        auto& it = *static_cast<Queue*>(q);
        for (long task; (task = it.next.fetch_add(1, std::memory_order_relaxed)) < it.tasks;)
          it.body(it.context, task, member);
      },
      &queue);
}

bool crowded() {
  const auto last = last_crowded.load(std::memory_order_relaxed);
  return last && Clock::now().time_since_epoch().count() - last < moment.count();
}

void Barrier::wait(int members) {
  constexpr int spins = 4000;  // tens of microseconds: longer than a step's imbalance, shorter than a time slice
  const int round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin) {
    if (spin == spins) last_crowded.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    if (spin < spins)
      relax();
    else
      std::this_thread::yield();
  }
}

}  // namespace throughtime
