// Memory for large arrays, kept for the next call. A fresh array costs a page fault for every page it touches (here up to
// two milliseconds a megabyte, docs/log.md), which a training step would pay again and again.
#pragma once

#include <cstddef>

namespace throughtime {

// From how many bytes on arrays and blocks are worth being kept; tests have all of them kept.
size_t least_pooled();
void pool_from(size_t bytes);

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

// Memory of its own, to be taken part by part; pooled where it is large. It is arbitrary in content.
class Block {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t line = 64, gap = line;  // which nobody may touch
#else
  static constexpr size_t line = 64, gap = 0;
#endif

 public:
  // What a part takes of it.
  template <class T>
  static constexpr size_t bytes(long count) {
    return count ? (count * sizeof(T) + line - 1) / line * line + gap : 0;
  }

  explicit Block(size_t bytes);
  Block(Block&& other) noexcept
      : memory_(other.memory_), bytes_(other.bytes_), taken_(other.taken_), is_pooled_(other.is_pooled_) {
    other.memory_ = nullptr;
  }
  Block(const Block&) = delete;
  ~Block();

  bool is_there() const { return memory_; }  // else no memory was left

  // The next part, at the beginning of a cache line; null where it has no elements.
  template <class T>
  T* take(long count) {
    return count ? static_cast<T*>(take(count * sizeof(T), bytes<T>(count))) : nullptr;
  }

 private:
  void* take(size_t used, size_t bytes);

  char* memory_;
  size_t bytes_, taken_ = 0;
  bool is_pooled_;
};

// Fill blocks with NaNs from now on, so that tests see who reads what nobody has written.
void fill_blocks(bool value);

// Memory for one call's scratch arrays, aligned to a cache line, or null where there is none left: the calling thread's own,
// kept between calls, and arbitrary in content. The next call of this function by the same thread ends its use.
void* scratch_memory(size_t bytes);

// Set `bytes` of an array to zero.
void clear(char* array, long bytes, int threads);

}  // namespace throughtime
