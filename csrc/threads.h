// Threads that work together on one call.
#pragma once

#include <atomic>

namespace throughtime {

// Run body(context, member, members) in `threads` threads, or in fewer; `members` tells how many there are.
// Uses torch's own OpenMP runtime where the process has one: its threads spin for milliseconds after each of torch's
// products, and threads of our own would have to share the cores with them.
void run_together(int threads, void (*body)(void* context, int member, int members), void* context);

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
