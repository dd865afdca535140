// Memory for large arrays, kept for the next call. A fresh array costs a page fault for every page it touches (here up to
// two milliseconds a megabyte, docs/log.md), which a training step would pay again and again.
#pragma once

#include <cstddef>

namespace throughtime {

// `bytes` of memory, aligned to a large page, or null where there is none left. Its content is arbitrary.
void* take_memory(size_t bytes);
void give_memory(void* memory);

// Blocks in use and idle never add up to more than what was in use at once, so nothing grows with the number of
// different sizes; and a block that lay idle for many calls is handed back to the system.
struct MemoryUse {
  size_t used, idle;  // bytes
};
MemoryUse memory_use();

// Hand back to the system all that is idle.
void release_memory();

// Memory of its own, aligned to a cache line; pooled where it is large. It is arbitrary in content, and null where there is
// none left.
class Block {
 public:
  explicit Block(size_t bytes);
  Block(Block&& other) noexcept : memory_(other.memory_), is_pooled_(other.is_pooled_) { other.memory_ = nullptr; }
  Block(const Block&) = delete;
  ~Block();

  void* get() const { return memory_; }

 private:
  void* memory_;
  bool is_pooled_;
};

// Memory for one call's scratch arrays, aligned to a cache line, or null where there is none left: the calling thread's own,
// kept between calls, and arbitrary in content. The next call of this function by the same thread ends its use.
void* scratch_memory(size_t bytes);

// Set `bytes` of an array to zero.
void clear(char* array, long bytes, int threads);

}  // namespace throughtime
