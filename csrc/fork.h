// What a process that forks leaves in a state that its child can go on with.
#pragma once

namespace throughtime {

// While one of these lives, a thread that forks first calls `hold`, and then, in the parent and in the child, `let_go`: so no thread
// that the child lacks is at work on what these guard. `hold` may wait for other threads, which must not need the GIL to finish.
class AtFork {
 public:
  AtFork(void* context, void (*hold)(void*), void (*let_go)(void*, bool is_child));
  AtFork(const AtFork&) = delete;
  ~AtFork();

 private:
  friend struct EachAtFork;
  void* const context_;
  void (*const hold_)(void*);
  void (*const let_go_)(void*, bool);
};

// Whether a thread is about to fork, and waits for others to finish.
bool is_forking();

}  // namespace throughtime
