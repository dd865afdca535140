#include "dispatch.h"

namespace throughtime {

const std::vector<const InstructionSet*>& instruction_sets() {
  static const std::vector<const InstructionSet*> usable = [] {
    std::vector<const InstructionSet*> sets;
#if defined(THROUGHTIME_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::instruction_set);
      sets.push_back(&avx512::instruction_set);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2::instruction_set);
#endif
    sets.push_back(&generic::instruction_set);
    return sets;
  }();
  return usable;
}

}  // namespace throughtime
