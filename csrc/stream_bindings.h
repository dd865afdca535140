// What Python sees of streams.
#pragma once

#include <nanobind/nanobind.h>

#include "request.h"

namespace throughtime {

// `active` says which instruction set is in use.
void bind_streams(nanobind::module_& module, const InstructionSet* const* active);

}  // namespace throughtime
