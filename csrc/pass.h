// A pass through a layer: the time loop, and the products around it that need not be sequential. They go stretch by stretch
// of steps, so that what one writes is still in the cache when the other reads it, and a pass needs little memory of its own.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "request.h"

namespace throughtime {

// Some steps, and where their rows lie in packed arrays.
struct Stretch {
  long begin, end, first_row, last_row;
};

// What W_ih meets, packed.
template <class E>
struct Input {
  const E* rows;       // (., I); or null
  long width, stride;  // I; from one row to the next
  const int64_t* ids;  // (.): which column of W_ih; or null
};

template <class E>
struct ForwardPass {
  using T = Arithmetic<E>;
  std::vector<Stretch> stretches;  // in the order in which they are run
  ForwardCall<E> loop;  // variant, x and ids are the pass's business; first_kept_row: the packed row at which what is kept begins
  std::optional<Variant<E>> variant;
  Input<E> input;
  Weight<E> weight_ih;  // the right factor of rows, if there are any
  const T* table;      // (V, G*H): W_ih x of each token id; or null
};

template <class E>
struct BackwardPass {
  using T = Arithmetic<E>;
  std::vector<Stretch> stretches;
  BackwardCall<E> loop;  // variant, and what the loop writes for the products after it, are the pass's business
  std::optional<Variant<E>> variant;
  Input<E> input;
  Weight<E> weight_ih;  // in the order in which the loop's rows have the gates (see turn_to_rows); or none
  E* grad_input;       // packed (., I); or null
  // To which gradients are added, as torch has the weights. A variant's biases are among the loop's sums; of plain cells
  // sum_bias_hh is null where the two biases have one gradient.
  T *sum_ih, *sum_hh, *sum_hr;   // (G*H, I), or for ids its transpose (V, G*H); (G*H, P); (P, H) or null
  T *sum_bias_ih, *sum_bias_hh;  // (G*H,), or null
};

// What a forward pass leaves for the backward pass, beside input and output: arrays by their names in a call, with a row for each
// real step, so many H wide and so many numbers more; of the arithmetic's type where they are wide.
struct Saved {
  const char* name;
  long hiddens, others;
  bool is_wide;
};
std::vector<Saved> saved(const Facts& facts, int gates, bool is_variant, bool is_normalised);

// How many H of gradients the backward loop writes for a row.
inline long gradient_gates(const Facts& facts, int gates, bool is_variant) {
  return is_variant ? 2 * gates : gates + facts.offset_hh;
}

// W_ih (G*H, I), its gates in the order in which the plain backward loop's rows have them.
template <class T>
void turn_to_rows(const Layout& s, long input, const T* weight_ih, T* turned) {
  const long first = s.facts.turned * s.hidden * input, all = s.gate_count * s.hidden * input;
  memcpy(turned, weight_ih + first, sizeof(T) * (all - first));
  memcpy(turned + all - first, weight_ih, sizeof(T) * first);
}

// Where a variant's gradients that are sums over all rows go: as torch has the parameters, or null.
template <class T>
struct VariantSums {
  T *bias_ih, *bias_hh, *weight_ch, *gain_ih, *gain_hh, *gain_c, *shift_c;
};

// Add up what `most_groups` groups have left in a backward call's sums.
template <class T>
void add_up(const Layout& s, long groups, const T* sums, const VariantSums<T>& to);

enum class Ended { done, out_of_memory, interrupted };

// One pass, or both directions of a layer at once. Between two stretches `is_interrupted` is asked, a few times a second, whether
// to give up: a pass may take minutes.
template <class E>
Ended run_forward(const Kernels<E>& kernels, const ForwardPass<E>* const* passes, int count, bool (*is_interrupted)());
template <class E>
Ended run_backward(const Kernels<E>& kernels, const BackwardPass<E>* const* passes, int count, bool (*is_interrupted)());

}  // namespace throughtime
