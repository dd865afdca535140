// Threads that work together on one call.
#pragma once

#include <atomic>

namespace throughtime {

// Run body(context, member, members) in `threads` threads, or in fewer; `members` tells how many there are.
// Uses torch's own OpenMP runtime where the process has one: its threads spin for milliseconds after each of torch's
// products, and threads of our own would have to share the cores with them. Elsewhere it keeps threads of its own.
// While it is `crowded` the calling thread works alone. Each of them takes denormals for zero meanwhile (denormals.h). Throws nothing,
// if `body` doesn't: where there is no memory for threads there are fewer.
void run_together(int threads, void (*body)(void* context, int member, int members), void* context);

// Use threads of our own from now on even where there is OpenMP, however `crowded` it is: for tests.
void use_own_threads(bool value);

// Run body(context, task, member) for task = 0 ... tasks - 1, in up to `threads` threads. Each takes the next task when it
// is done with one, so a thread that shares its core with a neighbour process does fewer of them.
void run_tasks(int threads, long tasks, void (*body)(void* context, long task, int member), void* context);

// Run body(context, member) once in each thread that torch's own operators have here: the calling one, which is member 0, and
// those of torch's OpenMP runtime, where the process has one.
void run_in_each(int threads, void (*body)(void* context, int member), void* context);

// Whether threads that others waited for had no core a moment ago, at a barrier or at the end of their work. While that
// is so, a team is slower than a single thread: each of its meetings may last as long as a time slice of the process that
// has the core. Now and then a team tries again.
bool crowded();

// How many calls of `run_together` for several threads had them, and how many worked alone since it was crowded.
struct Meetings {
  long teams, alone;
};
Meetings meetings();

// Where all members of a team wait for each other. Spinning is bounded: after that a waiting thread gives its core
// away at each look, so that a neighbour process that holds the other core costs time slices and no more.
class Barrier {
 public:
  void wait(int members);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

}  // namespace throughtime
