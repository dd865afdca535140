// A pass through a layer: the time loop, and the products around it that need not be sequential. They go stretch by stretch
// of steps, so that what one writes is still in the cache when the other reads it, and a pass needs little memory of its own.
#pragma once

#include <vector>

#include "sequence.h"

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
  Forward<E> loop;     // x and ids are the pass's business; first_row: the packed row at which gates and kept begin
  Input<E> input;
  const E* weight_ih;  // packed by pack_columns as the right factor of rows; or null
  const T* table;      // (V, G*H): W_ih x of each token id; or null
};

template <class E>
struct BackwardPass {
  using T = Arithmetic<E>;
  std::vector<Stretch> stretches;
  Backward<E> loop;    // what the loop writes for the products after it is the pass's business
  Input<E> input;
  const E* weight_ih;  // packed by pack_columns, a GRU's gates in the order n, r, z; or null
  E* grad_input;       // packed (., I); or null
  // To which gradients are added. Of a GRU sum_ih and sum_bias_ih hold the gates in the order n, r, z, sum_hh and
  // sum_bias_hh r, z, n. For all other cells sum_bias_hh is null: there the two biases have one gradient.
  T *sum_ih, *sum_hh, *sum_hr;  // (G*H, I), or for ids its transpose (V, G*H); (G*H, P); (P, H) or null
  T *sum_bias_ih, *sum_bias_hh;  // (G*H,), or null
};

enum class Ended { done, out_of_memory, interrupted };

// One pass, or both directions of a layer at once. Between two stretches `is_interrupted` is asked, a few times a second, whether
// to give up: a pass may take minutes.
template <class E>
Ended run_forward(const Kernels<E>& kernels, const ForwardPass<E>* const* passes, int count, bool (*is_interrupted)());
template <class E>
Ended run_backward(const Kernels<E>& kernels, const BackwardPass<E>* const* passes, int count, bool (*is_interrupted)());

}  // namespace throughtime
