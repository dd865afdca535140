// The time loop of the cells' variants. Plain cells have a loop of their own (plain.h), in which a unit's gates never leave the
// registers between the product and the nonlinearities.
#pragma once

#include "request.h"

namespace throughtime::THROUGHTIME_ISA {

bool forward_variant(const ForwardCall<float>* calls, int count);
bool forward_variant(const ForwardCall<double>* calls, int count);
bool forward_variant(const ForwardCall<Bf16>* calls, int count);
bool backward_variant(const BackwardCall<float>* calls, int count);
bool backward_variant(const BackwardCall<double>* calls, int count);
bool backward_variant(const BackwardCall<Bf16>* calls, int count);

}  // namespace throughtime::THROUGHTIME_ISA
