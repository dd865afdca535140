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
using std::chrono::milliseconds;

// When a thread was last waited for in vain, and until when nobody waits for it again.
std::atomic<Clock::rep> last_wait{0}, crowded_until{0};

Clock::rep clock_now() { return Clock::now().time_since_epoch().count(); }

// Once is chance, a hiccup of the machine; twice in short time is a neighbour, and he is believed to stay.
void note_wait() {
  constexpr Clock::duration soon = milliseconds(100), stays = milliseconds(400);
  const auto now = clock_now(), last = last_wait.exchange(now, std::memory_order_relaxed);
  const auto until = crowded_until.load(std::memory_order_relaxed);
  const bool is_repeated = last && now - last < soon.count(), was_crowded = until && now - until < stays.count();
  if (is_repeated || was_crowded) crowded_until.store(now + stays.count(), std::memory_order_relaxed);
}

struct Work {
  void (*body)(void*, int, int);
  void* context;
  Clock::time_point begin = Clock::now(), end;  // of the calling thread's part

  // Whether the calling thread waited for the others for most of the time: alone it would have been done sooner.
  bool was_held_up() const {
    const auto now = Clock::now();
    return now - end > milliseconds(2) && now - end > end - begin;
  }
};

}  // namespace

void run_together(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1 || crowded()) return body(context, 0, 1);
  if (openmp().parallel) {
    Work work{body, context};
    openmp().parallel(
        [](void* w) {
          auto* it = static_cast<Work*>(w);
          const int member = openmp().thread();
          it->body(it->context, member, openmp().threads());
          if (member == 0) it->end = Clock::now();
        },
        &work, static_cast<unsigned>(threads), 0);
    if (work.was_held_up()) note_wait();
    return;
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
  const auto until = crowded_until.load(std::memory_order_relaxed);
  return until && clock_now() < until;
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
    if (spin == spins) note_wait();
    if (spin < spins)
      relax();
    else
      std::this_thread::yield();
  }
}

}  // namespace throughtime
