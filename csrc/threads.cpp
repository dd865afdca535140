#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "denormals.h"
#include "fork.h"

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

std::atomic<bool> own_threads_are_used{false};

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr Clock::duration soon = milliseconds(100), shortest = milliseconds(10), longest = milliseconds(400), hiccup = milliseconds(2);

// When a thread was last waited for in vain, until when nobody waits for it again, how long that is, and since when nothing speaks for it.
std::atomic<Clock::rep> last_wait{0}, crowded_until{0}, belief{shortest.count()}, calm_since{0};
std::atomic<long> teams{0}, alone{0};

Clock::rep clock_now() { return Clock::now().time_since_epoch().count(); }

// Once is chance, a hiccup of the machine; twice in short time is a neighbour. He is believed to stay for a while, and for twice as
// long each time that a team has tried again in vain: another pool's threads, which spin after their work, are soon asleep, and a
// process stays.
void note_wait() {
  const auto now = clock_now(), last = last_wait.exchange(now, std::memory_order_relaxed);
  calm_since.store(now, std::memory_order_relaxed);
  const auto until = crowded_until.load(std::memory_order_relaxed), stays = belief.load(std::memory_order_relaxed);
  const bool is_repeated = last && now - last < soon.count(), is_tried = until && now >= until && now - until < longest.count();
  if (!is_repeated && !is_tried) return;
  const auto next = is_tried ? std::min(2 * stays, longest.count()) : stays;
  belief.store(next, std::memory_order_relaxed);
  crowded_until.store(now + next, std::memory_order_relaxed);
}

// A team met without waiting: the neighbour wasn't there, so that the next wait is chance again. He is believed to stay half as long
// once teams have met so for as long as he was believed to stay: a process beside which they do for a few milliseconds will have its
// next time slice.
void note_meeting() {
  const auto until = crowded_until.load(std::memory_order_relaxed), stays = belief.load(std::memory_order_relaxed);
  if (!until && stays == shortest.count()) return;
  const auto now = clock_now();
  if (now >= until) crowded_until.store(0, std::memory_order_relaxed);
  if (stays == shortest.count() || now - calm_since.load(std::memory_order_relaxed) < stays) return;
  calm_since.store(now, std::memory_order_relaxed);
  belief.store(std::max(stays / 2, shortest.count()), std::memory_order_relaxed);
}

// What the processor has spent on the calling thread.
Clock::duration processor_time() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::duration_cast<Clock::duration>(std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec));
}

struct Work {
  void (*body)(void*, int, int);
  void* context;
  Clock::time_point begin = Clock::now();
  Clock::duration own{};  // the processor's time for the calling thread's part, or, where it was short, how long it lasted
  int members = 1;
  std::atomic<long> waits{0};  // of members at barriers, that were in vain

  // Whether the calling thread would have been done sooner alone. By the processor's time: two threads on one core take turns of
  // milliseconds, and each one's part seems to last as long as its waiting.
  bool was_held_up() const { return Clock::now() - begin > members * own + hiccup; }

  // What the team's meeting was like.
  void note() const {
    const long vain = waits.load(std::memory_order_relaxed) + was_held_up();
    for (long wait = 0; wait < std::min(vain, 2L); ++wait) note_wait();
    if (!vain) note_meeting();
  }
};

thread_local Work* own_team = nullptr;

// A member's part. Every thread that computes anything comes through here, or, by itself, through `run_together`.
void take_part(Work& team, int member, int members) {
  const FlushDenormals flush;
  const auto begin = member ? Clock::duration{} : processor_time();
  Work* const before = std::exchange(own_team, &team);
  team.body(team.context, member, members);
  own_team = before;
  if (member) return;
  team.members = members;
  const auto lasted = Clock::now() - team.begin;
  team.own = lasted < hiccup ? lasted : processor_time() - begin;
}

void run_alone(void (*body)(void*, int, int), void* context) {
  const FlushDenormals flush;
  body(context, 0, 1);
}

// A thread of our own: it sleeps until it is given a member's part, does it, and sleeps again.
class Worker {
 public:
  // Throws where the system has no more threads, or no more memory.
  Worker() {
    sigset_t others, before;  // signals are for the threads that the program itself made, but for a thread's own faults
    sigfillset(&others);
    for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGPROF}) sigdelset(&others, own);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    try {
      std::thread([this] { work(); }).detach();
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void start(Work& team, int member, int members) {
    const std::lock_guard lock(mutex_);
    team_ = &team;
    member_ = member;
    members_ = members;
    changed_.notify_one();
  }

  void wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return !team_; });
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return team_ != nullptr; });
      lock.unlock();
      take_part(*team_, member_, members_);
      lock.lock();
      team_ = nullptr;
      done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_, done_;
  Work* team_ = nullptr;
  int member_ = 0, members_ = 0;
};

// Threads of our own, for processes without OpenMP. They are lent to one call at a time and kept for the next ones.
class Workers {
 public:
  // As many as there are, or can be made, up to `count`.
  std::vector<Worker*> take(int count) {
    const std::lock_guard lock(mutex_);
    std::vector<Worker*> taken;
    try {
      taken.reserve(count);
      for (; static_cast<int>(taken.size()) < count && !idle_.empty(); idle_.pop_back()) taken.push_back(idle_.back());
      while (static_cast<int>(taken.size()) < count) {
        idle_.reserve(made_ + 1);  // so that giving back can't fail
        taken.push_back(new Worker);
        ++made_;
      }
    } catch (const std::exception&) {  // fewer do it too
    }
    return taken;
  }

  void give(const std::vector<Worker*>& workers) {
    const std::lock_guard lock(mutex_);
    idle_.insert(idle_.end(), workers.begin(), workers.end());
  }

 private:
  std::mutex mutex_;
  std::vector<Worker*> idle_;
  size_t made_ = 0;
};

// Never destroyed: they may work until the process ends. After a fork the child has none of them, and makes its own.
Workers* workers = new Workers;
const AtFork own_in_a_child(
    nullptr, [](void*) {},
    [](void*, bool is_child) {
      if (is_child) workers = new Workers;
    });

}  // namespace

void use_own_threads(bool value) { own_threads_are_used = value; }

void run_together(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return run_alone(body, context);
  if (crowded() && !own_threads_are_used) {
    alone.fetch_add(1, std::memory_order_relaxed);
    return run_alone(body, context);
  }
  teams.fetch_add(1, std::memory_order_relaxed);
  if (openmp().parallel && !own_threads_are_used) {
    Work work{body, context};
    openmp().parallel(
        [](void* w) {
          auto& it = *static_cast<Work*>(w);
          const int member = openmp().thread();
          take_part(it, member, openmp().threads());
        },
        &work, static_cast<unsigned>(threads), 0);
    return work.note();
  }
  const std::vector<Worker*> others = workers->take(threads - 1);
  const int members = static_cast<int>(others.size()) + 1;
  Work work{body, context};
  for (int member = 1; member < members; ++member) others[member - 1]->start(work, member, members);
  take_part(work, 0, members);
  for (Worker* other : others) other->wait();
  workers->give(others);
  work.note();
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

void run_in_each(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1 || !openmp().parallel) return body(context, 0);
  struct Each {
    void (*body)(void*, int);
    void* context;
  } each{body, context};
  openmp().parallel(
      [](void* e) {
        const auto& it = *static_cast<const Each*>(e);
        it.body(it.context, openmp().thread());
      },
      &each, static_cast<unsigned>(threads), 0);
}

Meetings meetings() { return {teams.load(std::memory_order_relaxed), alone.load(std::memory_order_relaxed)}; }

bool crowded() {
  const auto until = crowded_until.load(std::memory_order_relaxed);
  return until && clock_now() < until;
}

void Barrier::wait(int members) {
  // Tens of microseconds: longer than a step's imbalance, shorter than a time slice. Where a team waited so long in vain once, two of
  // its members may be on one core, where the system wakes them at times and leaves them for 10 ms: there each wait keeps the other off it.
  constexpr int spins = 4000, fewer = 400;
  const int round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  const int most = own_team && own_team->waits.load(std::memory_order_relaxed) ? fewer : spins;
  for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin) {
    if (spin == most && own_team) own_team->waits.fetch_add(1, std::memory_order_relaxed);
    if (spin < most)
      relax();
    else
      std::this_thread::yield();
  }
}

}  // namespace throughtime
