#include "dispatch.h"

#if defined(THROUGHTIME_X86)
#include <cpuid.h>
#endif

namespace throughtime {
namespace avx512_vnni {
extern const StreamKernels stream_kernels;
}

namespace {

struct Candidate {
  const char* name;
  const InstructionSet* built;  // or null: the compiler didn't know it (CMakeLists.txt)
  bool is_runnable;
};

#if defined(THROUGHTIME_AVX2)
constexpr const InstructionSet* built_avx2 = &avx2::instruction_set;
#else
constexpr const InstructionSet* built_avx2 = nullptr;
#endif
#if defined(THROUGHTIME_AVX512)
constexpr const InstructionSet* built_avx512 = &avx512::instruction_set;
#else
constexpr const InstructionSet* built_avx512 = nullptr;
#endif
#if defined(THROUGHTIME_AVX512_BF16)
constexpr const InstructionSet* built_avx512_bf16 = &avx512_bf16::instruction_set;
#else
constexpr const InstructionSet* built_avx512_bf16 = nullptr;
#endif

#if defined(THROUGHTIME_X86)
// Leaf 7, subleaf 0, ECX bit 11.
bool has_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ecx >> 11 & 1);
}

// Leaf 7, subleaf 1, EAX bit 5. GCC 9 doesn't know the name "avx512bf16"; it knows the rest, and that the system keeps registers of that width.
// No CPU has it without VNNI.
bool has_bf16() {
  unsigned eax, ebx, ecx, edx;
  if (!has_vnni() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || eax < 1) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

// All there are, the fastest first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#if defined(THROUGHTIME_X86)
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  all.push_back({"avx512_bf16", built_avx512_bf16, has_avx512 && has_bf16()});
  all.push_back({"avx512", built_avx512, has_avx512});
  all.push_back({"avx2", built_avx2, has_avx2});
#endif
  all.push_back({"generic", &generic::instruction_set, true});
  return all;
}

}  // namespace

const std::vector<const InstructionSet*>& instruction_sets() {
  static const std::vector<const InstructionSet*> usable = [] {
    std::vector<const InstructionSet*> sets;
    for (const Candidate& set : candidates())
      if (set.built && set.is_runnable) sets.push_back(set.built);
    return sets;
  }();
  return usable;
}

const StreamKernels& stream_kernels_of(const InstructionSet& set) {
#if defined(THROUGHTIME_AVX512)
  if (&set == built_avx512 && has_vnni()) return avx512_vnni::stream_kernels;
#endif
  return *set.stream;
}

const std::vector<std::string>& unbuilt_instruction_sets() {
  static const std::vector<std::string> wanted = [] {
    std::vector<std::string> names;
    for (const Candidate& set : candidates()) {
      if (set.built && set.is_runnable) break;
      if (set.is_runnable) names.emplace_back(set.name);
    }
    return names;
  }();
  return wanted;
}

}  // namespace throughtime
