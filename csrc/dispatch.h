// Which instruction set serves this machine.
#pragma once

#include <string>
#include <vector>

#include "request.h"

namespace throughtime {

// Those that this build has and this machine can run, the fastest first; the last is `generic`.
const std::vector<const InstructionSet*>& instruction_sets();

// Those faster than all of these that this machine could run, had the compiler known them.
const std::vector<std::string>& unbuilt_instruction_sets();

// The code for streams that goes with a set: of what the CPU has beside it, the fastest.
const StreamKernels& stream_kernels_of(const InstructionSet& set);

}  // namespace throughtime
