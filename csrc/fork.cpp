#include "fork.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <unordered_set>

namespace throughtime {

// All that live. It is never destroyed: engines may outlive everything else.
struct EachAtFork {
  std::mutex mutex;
  std::unordered_set<AtFork*> all;
  std::atomic<bool> is_forking{false};

  static EachAtFork& it() {
    static EachAtFork* const it = [] {
      pthread_atfork([] { EachAtFork::it().hold(); }, [] { EachAtFork::it().let_go(false); },
                     [] { EachAtFork::it().let_go(true); });
      return new EachAtFork;
    }();
    return *it;
  }

  void hold() {
    mutex.lock();
    is_forking = true;
    for (const AtFork* each : all) each->hold_(each->context_);
  }
  void let_go(bool is_child) {
    for (const AtFork* each : all) each->let_go_(each->context_, is_child);
    is_forking = false;
    mutex.unlock();
  }
};

AtFork::AtFork(void* context, void (*hold)(void*), void (*let_go)(void*, bool))
    : context_(context), hold_(hold), let_go_(let_go) {
  EachAtFork& each = EachAtFork::it();
  const std::lock_guard lock(each.mutex);
  each.all.insert(this);
}

AtFork::~AtFork() {
  EachAtFork& each = EachAtFork::it();
  const std::lock_guard lock(each.mutex);
  each.all.erase(this);
}

bool is_forking() { return EachAtFork::it().is_forking.load(std::memory_order_relaxed); }

}  // namespace throughtime
