// A stack of cotangents carried back through one layer: what a call says. The loop itself is cotangents.cpp.
#pragma once

#include "request.h"

namespace throughtime {

// Row s of the stack is the gradient of the loss at step loss_steps[s] with respect to the state at step t, followed over
// `lags` steps. A cell's step is given by its linear factors (throughtime.cells.Linearised), each (T, B, H), or
// (T, B, G, H) to its gates:
//
//     da = h_to_a dh + c_to_a dc        dc' = h_to_c dh + c_to_c dc        dh' = h_to_h dh + W_hh^T da
//
// T is float or double.
template <class T>
struct Cotangents {
  int threads;
  bool reverse;  // the layer runs from the last step to the first, so cotangents go from the first to the last
  long steps, batch, hidden, gates;
  long losses, lags;
  const int64_t* loss_steps;  // (S,), ascending
  const T *h_to_a, *c_to_a;   // null without c
  const T *h_to_h, *h_to_c, *c_to_c;  // null where there is none
  const T* weight_hh;    // packed by pack_columns, H columns of depth G*H
  const T* grad_output;  // (T, B, H): what each step's loss sends into h
  T* norms;              // (S, K, B): of the whole state, by loss and lag; where there is no such step it isn't written
};

}  // namespace throughtime

#if defined(THROUGHTIME_ISA)
namespace throughtime::THROUGHTIME_ISA {
// Return false when memory runs out.
bool cotangent_norms(const Cotangents<float>&);
bool cotangent_norms(const Cotangents<double>&);
}  // namespace throughtime::THROUGHTIME_ISA
#endif
