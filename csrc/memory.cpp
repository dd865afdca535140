#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "fork.h"
#include "threads.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace throughtime {
namespace {

constexpr size_t large_page = 2u << 20, line = 64;
size_t least_pooled_bytes = large_page / 2;
bool blocks_are_filled = false;
constexpr long oldest = 1000;  // calls of take_memory that an idle block outlives

void* from_system(size_t bytes) {
  void* memory = std::aligned_alloc(large_page, bytes);
#if defined(MADV_HUGEPAGE)
  if (memory) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: where the system doesn't know it, nothing happens
#endif
  return memory;
}

// Blocks that nobody will use again; they are freed when no lock is held, since that may take long.
class Leaving {
 public:
  Leaving() = default;
  Leaving(const Leaving&) = delete;
  ~Leaving() {
    for (void* memory : all_) std::free(memory);
  }
  void add(void* memory) { all_.push_back(memory); }

 private:
  std::vector<void*> all_;
};

class Pool {
 public:
  void* take(size_t bytes) {
    bytes = (std::max(bytes, size_t{1}) + large_page - 1) / large_page * large_page;
    if (void* const idle = take_idle(bytes)) return idle;
    void* memory = from_system(bytes);
    if (!memory) {
      let_idle_go();
      memory = from_system(bytes);
    }
    const std::lock_guard lock(mutex_);
    if (memory) return use({memory, bytes, 0});
    used_bytes_ -= bytes;
    return nullptr;
  }

  void give(void* memory) {
    Leaving leaving;
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(memory);
    idle_.push_back({memory, found->second, calls_});
    idle_bytes_ += found->second;
    used_bytes_ -= found->second;
    used_.erase(found);
    while (idle_.front().since + oldest < calls_) leaving.add(remove(&idle_.front()).memory);
  }

  void release() {
    let_idle_go();
    const std::lock_guard lock(mutex_);
    most_used_ = used_bytes_;
  }

  MemoryUse use() {
    const std::lock_guard lock(mutex_);
    return {used_bytes_, idle_bytes_};
  }

 private:
  struct Idle {
    void* memory;
    size_t bytes;
    long since;
  };

  // An idle block; or null, and then there is room for one of so many bytes, which counts as used already.
  void* take_idle(size_t bytes) {
    Leaving leaving;
    const std::lock_guard lock(mutex_);
    ++calls_;
    Idle* best = nullptr;
    for (Idle& it : idle_)  // a block twice as large would be missed elsewhere
      if (it.bytes >= bytes && it.bytes < 2 * bytes && (!best || it.bytes <= best->bytes)) best = &it;
    const size_t taken = best ? best->bytes : bytes;
    if (!best) shrink(std::max(most_used_, used_bytes_ + bytes) - bytes, leaving);
    used_bytes_ += taken;
    return best ? use(remove(best)) : nullptr;
  }

  void let_idle_go() {
    Leaving leaving;
    const std::lock_guard lock(mutex_);
    shrink(0, leaving);
  }

  Idle remove(Idle* it) {
    const Idle removed = *it;
    idle_bytes_ -= removed.bytes;
    idle_.erase(idle_.begin() + (it - idle_.data()));
    return removed;
  }

  void* use(Idle block) {
    used_[block.memory] = block.bytes;
    most_used_ = std::max(most_used_, used_bytes_);
    return block.memory;
  }

  // Let go what has been idle longest, until used and idle blocks together hold at most `bytes`.
  void shrink(size_t bytes, Leaving& leaving) {
    while (!idle_.empty() && used_bytes_ + idle_bytes_ > bytes) leaving.add(remove(&idle_.front()).memory);
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> used_;
  std::vector<Idle> idle_;  // since ever more recent calls
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_used_ = 0;
  long calls_ = 0;
  const AtFork at_fork_{this, [](void* pool) { static_cast<Pool*>(pool)->mutex_.lock(); },
                        [](void* pool, bool) { static_cast<Pool*>(pool)->mutex_.unlock(); }};
};

// Never destroyed: arrays may outlive everything else.
Pool& pool = *new Pool;

class ThreadMemory {
 public:
  ~ThreadMemory() { std::free(memory_); }

  void* at_least(size_t bytes) {
    if (bytes <= bytes_) return memory_;
    std::free(memory_);
    bytes_ = (bytes + line - 1) / line * line;
    memory_ = std::aligned_alloc(line, bytes_);
    if (!memory_) bytes_ = 0;
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace

void* scratch_memory(size_t bytes) {
  thread_local ThreadMemory scratch;
  return scratch.at_least(std::max(bytes, size_t{1}));
}

Block::Block(size_t bytes) : bytes_((std::max(bytes, line) + line - 1) / line * line) {
  is_pooled_ = bytes_ >= least_pooled_bytes;
  memory_ = static_cast<char*>(is_pooled_ ? take_memory(bytes_) : std::aligned_alloc(line, bytes_));
  if (memory_ && blocks_are_filled) memset(memory_, 0xFF, bytes_);
}

Block::~Block() {
  if (!memory_) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_, bytes_);
#endif
  is_pooled_ ? give_memory(memory_) : std::free(memory_);
}

void* Block::take(size_t used, size_t bytes) {
  char* const part = memory_ + taken_;
  taken_ += bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(part + used, bytes - used);
#else
  (void)used;
#endif
  return part;
}

size_t least_pooled() { return least_pooled_bytes; }
void pool_from(size_t bytes) { least_pooled_bytes = bytes; }

void fill_blocks(bool value) { blocks_are_filled = value; }

void* take_memory(size_t bytes) { return pool.take(bytes); }
void give_memory(void* memory) { pool.give(memory); }
MemoryUse memory_use() { return pool.use(); }
void release_memory() { pool.release(); }

void clear(char* array, long bytes, int threads) {
  constexpr long worth_sharing = 1 << 20;
  struct Task {
    char* array;
    long bytes;
  } task{array, bytes};
  run_together(
      bytes < worth_sharing ? 1 : threads,
      [](void* context, int member, int members) {
        const auto& it = *static_cast<const Task*>(context);
        const long begin = it.bytes * member / members, end = it.bytes * (member + 1) / members;
        if (begin < end) memset(it.array + begin, 0, end - begin);
      },
      &task);
}

}  // namespace throughtime
