// What CMakeLists.txt compiles with an instruction set's flags, and leaves the set out where it fails: the code that is the
// instruction set's own, a product of each element type and its rounding.
#include "product.h"

namespace throughtime::THROUGHTIME_ISA {

template void multiply<float, 1>(int, long, long, const float*, long, const float*, const float*, float*, long);
template void multiply<double, 1>(int, long, long, const double*, long, const double*, const double*, double*, long);
template void multiply<Bf16, 1>(int, long, long, const Bf16*, long, const Bf16*, const float*, float*, long);

void round(Bf16* to, Vector<float> v) { store(to, v); }

}  // namespace throughtime::THROUGHTIME_ISA
