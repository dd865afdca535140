// The time loop of the plain cells, and the products outside it. Compiled once for each instruction set.
#include "plain.h"

#include "cells.h"
#include "cotangents.h"
#include "variants.h"

namespace throughtime::THROUGHTIME_ISA {
namespace {

// Packing the weights ------------------------------------------------------------------------------------------------

// A plain cell's panels hold a unit's gates side by side, a variant's are in order.
template <class E>
PanelShape forward_panels(const Layout& s, bool is_variant) {
  return is_variant ? plain_panels(s.joint() * s.hidden) : joint_panels(s.joint(), s.hidden);
}

// Whether a forward pass reads weights as they lie: to turn them for every few rows anew costs less than to pack them for so few, and
// the more so where they don't fit a cache (docs/log.md).
bool reads_plain(const Layout& s) {
  const bool is_large = s.gate_count * s.hidden * s.width() > 1 << 19;
  return s.steps * ((s.batch + few_rows - 1) / few_rows) <= (is_large ? 8 : 4);
}

template <class E>
PackedSizes forward_sizes(const Layout& s, bool is_variant) {
  using T = Arithmetic<E>;
  const PanelShape shape = forward_panels<E>(s, is_variant);
  PackedSizes sizes{};
  if (!is_variant) sizes.bias = 2 * packed_size<T>(shape, 1) + packed_size<T>(plain_panels(s.hidden), 1);
  if (reads_plain(s)) return sizes;
  sizes.weight_hh = packed_size<E>(shape, s.width());
  if (s.has_last()) sizes.weight_last = packed_size<E>(plain_panels(s.hidden), s.hidden);
  if (s.projected) sizes.weight_hr = packed_size<E>(plain_panels(s.projected), s.hidden);
  return sizes;
}

template <class E>
PackedSizes backward_sizes(const Layout& s) {
  PackedSizes sizes{};
  sizes.weight_hh = packed_size<E>(plain_panels(s.width()), s.joint() * s.hidden);
  if (s.has_last()) sizes.weight_last = packed_size<E>(plain_panels(s.hidden), s.hidden);
  if (s.projected) sizes.weight_hr = packed_size<E>(plain_panels(s.hidden), s.projected);
  return sizes;
}

template <class T>
void pack_bias(PanelShape shape, const T* bias, T* packed) {
  if (bias)
    pack_panels<T>(shape, 1, bias, 1, 1, 0, panel_count<T>(shape), packed);
  else
    memset(packed, 0, sizeof(T) * packed_size<T>(shape, 1));
}

// Three parts: what starts the product, what is added to it, and the last gate's.
template <class T>
void pack_biases(const Layout& s, PanelShape shape, const CellWeights<T>& from, T* packed) {
  const long H = s.hidden, size = packed_size<T>(shape, 1), last = s.joint() * H;
  pack_bias<T>(shape, from.bias_hh, packed);
  pack_bias<T>(shape, from.bias_ih, packed + size);
  if (!s.has_last()) return;
  T* bias = packed + 2 * size;
  pack_bias<T>(plain_panels(H), from.bias_ih ? from.bias_ih + last : nullptr, bias);
  if (from.bias_hh)
    for (long j = 0; j < H; ++j) bias[j] += from.bias_hh[last + j];  // one gate: panels of a bias are in order
}

template <class E>
PassWeights<E> pack_forward(const Layout& s, const CellWeights<Arithmetic<E>>& from, const PackedWeights<E>& to) {
  const auto weight = [&](PanelShape shape, long depth, const Arithmetic<E>* source, E* packed) -> Weight<E> {
    if (packed) pack<E>({shape, depth, source, depth, 1, packed}, s.threads);
    return {packed, source, depth};
  };
  const PanelShape shape = forward_panels<E>(s, !to.bias);
  const long H = s.hidden, P = s.width();
  if (to.bias) pack_biases(s, shape, from, to.bias);
  PassWeights<E> made{weight(shape, P, from.hh, to.hh), {}, {}};
  if (s.has_last()) made.last = weight(plain_panels(H), H, from.hh + s.joint() * H * H, to.last);
  if (s.projected) made.hr = weight(plain_panels(P), H, from.hr, to.hr);
  return made;
}

template <class E>
PassWeights<E> pack_backward(const Layout& s, const CellWeights<Arithmetic<E>>& from, const PackedWeights<E>& to) {
  const long H = s.hidden, P = s.width();
  pack<E>({plain_panels(P), s.joint() * H, from.hh, 1, P, to.hh}, s.threads);
  if (s.has_last()) pack<E>({plain_panels(H), H, from.hh + s.joint() * H * H, 1, H, to.last}, s.threads);
  if (s.projected) pack<E>({plain_panels(H), P, from.hr, 1, H, to.hr}, s.threads);
  return {{to.hh, nullptr, 0}, {to.last, nullptr, 0}, {to.hr, nullptr, 0}};
}

// The loops ----------------------------------------------------------------------------------------------------------

template <class E>
struct Loops {
  template <class... Cells>
  using Forwards = Run<ForwardCall<E>, PlainForwardBuffers<E>, typename Cells::Forward...>;
  template <class... Cells>
  using Backwards = Run<BackwardCall<E>, PlainBackwardBuffers<E>, typename Cells::Backward...>;
};

template <class E>
bool forward(const ForwardCall<E>* calls, int count) {
  return EachCell<E, Loops<E>::template Forwards>::go(calls, count);
}

template <class E>
bool backward(const BackwardCall<E>* calls, int count) {
  return EachCell<E, Loops<E>::template Backwards>::go(calls, count);
}

// The products outside -----------------------------------------------------------------------------------------------

template <class E>
long columns_size(long columns, long depth) {
  return packed_size<E>(plain_panels(columns), depth);
}

template <class E>
void pack_columns(long columns, long depth, const Arithmetic<E>* source, long column_stride, long depth_stride,
                  E* packed, int threads) {
  pack<E>({plain_panels(columns), depth, source, column_stride, depth_stride, packed}, threads);
}

// Below this many multiplications a product is done by the calling thread.
constexpr long worth_sharing = 200000;

template <class E, class Out>
void multiply_rows_by(long rows, long depth, long columns, const E* a, long a_stride, const Weight<E>& weight,
                      Out* out, long out_stride, int threads) {
  RowProduct<E, Out> it{rows, depth, columns, a, a_stride, weight, out, out_stride};
  it.run(rows * depth * columns < worth_sharing ? 1 : threads);
}

template <class E>
bool add_outer(long rows, long left, long right, const E* a, long a_stride, const E* b, long b_stride,
               Arithmetic<E>* sum, Arithmetic<E>* bias, int threads) {
  OuterProduct<E> it{rows, left, right, a, a_stride, b, b_stride, sum, bias, nullptr};
  if (rows * left * right < worth_sharing) threads = 1;
  it.workspace = static_cast<E*>(scratch_memory(sizeof(E) * threads * it.workspace_size()));
  if (!it.workspace) return false;
  it.run(threads);
  return true;
}

template <class E>
void add_by_id(long rows, long columns, const E* a, long a_stride, const int64_t* ids, Arithmetic<E>* table,
               long table_stride, int threads) {
  RowSums<E> it{rows, columns, a, a_stride, ids, table, table_stride};
  run_together(rows * columns < worth_sharing ? 1 : threads, RowSums<E>::work, &it);
}

template <class E>
constexpr Kernels<E> kernels{forward_sizes<E>,
                             backward_sizes<E>,
                             pack_forward<E>,
                             pack_backward<E>,
                             forward<E>,
                             backward<E>,
                             forward_variant,
                             backward_variant,
                             reads_plain,
                             most_groups,
                             columns_size<E>,
                             pack_columns<E>,
                             multiply_rows_by<E, Arithmetic<E>>,
                             multiply_rows_by<E, E>,
                             add_outer<E>,
                             add_by_id<E>};

template <class... Cells>
struct FactsOf {
  static constexpr Facts all[] = {Cells::facts...};
  static constexpr int count = sizeof...(Cells);
};
using EachFacts = EachCell<float, FactsOf>;

}  // namespace

#define THROUGHTIME_NAME_OF(name) #name
#define THROUGHTIME_NAME(name) THROUGHTIME_NAME_OF(name)
extern const StreamKernels stream_kernels;
const InstructionSet instruction_set{THROUGHTIME_NAME(THROUGHTIME_ISA), EachFacts::all, EachFacts::count,
                                      kernels<float>, kernels<double>, kernels<Bf16>, cotangent_norms, cotangent_norms,
                                      &stream_kernels};

}  // namespace throughtime::THROUGHTIME_ISA
