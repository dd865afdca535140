// The time loop of the cells' variants. Compiled once for each instruction set.
#include "variants.h"

#include "cells.h"

namespace throughtime::THROUGHTIME_ISA {
namespace {

template <class E>
struct Loops {
  template <class... Cells>
  using Forwards = Run<ForwardCall<E>, VariantForwardBuffers<E>, typename Cells::VariantForward...>;
  template <class... Cells>
  using Backwards = Run<BackwardCall<E>, VariantBackwardBuffers<E>, typename Cells::VariantBackward...>;
};

}  // namespace

#define THROUGHTIME_VARIANTS(E)                                              \
  bool forward_variant(const ForwardCall<E>* calls, int count) {             \
    return EachCell<E, Loops<E>::template Forwards>::go(calls, count);       \
  }                                                                          \
  bool backward_variant(const BackwardCall<E>* calls, int count) {           \
    return EachCell<E, Loops<E>::template Backwards>::go(calls, count);      \
  }
THROUGHTIME_VARIANTS(float)
THROUGHTIME_VARIANTS(double)
THROUGHTIME_VARIANTS(Bf16)
#undef THROUGHTIME_VARIANTS

}  // namespace throughtime::THROUGHTIME_ISA
