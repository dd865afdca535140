#include "signals.h"

#include <nanobind/nanobind.h>

namespace throughtime {
namespace {

namespace nb = nanobind;

unsigned long main_thread = 0;

bool handler_has_raised() {
  nb::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

bool nothing_has_raised() { return false; }

}  // namespace

void find_main_thread() {
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
}

IsInterrupted interruption() {
  return PyThread_get_thread_ident() == main_thread ? handler_has_raised : nothing_has_raised;
}

}  // namespace throughtime
