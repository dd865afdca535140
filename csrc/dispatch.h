// Which instruction set serves this machine.
#pragma once

#include <vector>

#include "sequence.h"

namespace throughtime {

// Those that this build has and this machine can run, the fastest first.
const std::vector<const InstructionSet*>& instruction_sets();

}  // namespace throughtime
