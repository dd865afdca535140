// A cell through time: what a call says. The time loop itself is sequence.cpp, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace throughtime {

// bfloat16: a float's upper half. It is stored and multiplied; sums and pointwise arithmetic are float.
struct Bf16 {
  uint16_t bits;
};

template <class E>
struct ArithmeticOf {
  using Type = E;
};
template <>
struct ArithmeticOf<Bf16> {
  using Type = float;
};

// The type in which elements of type E are computed with.
template <class E>
using Arithmetic = typename ArithmeticOf<E>::Type;

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };

constexpr int gate_count(Cell cell) { return cell == Cell::lstm ? 4 : cell >= Cell::gru ? 3 : 1; }

// Rows are sequences, by rank: longest first, so that those which take part in step t are the first `rows[t]` of them.
// Arrays called packed hold only those, step after step: row `rank` of step t is at first_row[t] + rank, exactly as in
// torch's PackedSequence. Without lengths rows[t] = B, and packed and (T, B, .) are one.
struct Layout {
  Cell cell;
  bool reverse;
  int threads;
  long begin, end;         // the steps of this call; the state is carried from call to call
  long steps, batch;       // T, B
  long hidden, projected;  // H, and P or 0
  const int64_t* rows;       // (T,) or null
  const int64_t* first_row;  // (T,) or null
  const int64_t* order;      // (B,) rank -> column of the batch, or null
  const uint8_t* reset;      // (T, B) or null
  bool is_packed;            // whether output and its gradient are packed, too, instead of (T, B, P)
  long output_stride;        // from one row of output, or of its gradient, to the next

  long width() const { return projected ? projected : hidden; }
};

// E: what products multiply, and what is kept for the backward pass. The carried state is of type Arithmetic<E>.
template <class E>
struct Forward : Layout {
  using T = Arithmetic<E>;
  T* x;            // packed (., G*H): W_ih x on entry, arbitrary on return; with ids, a table (V, G*H), not written to
  E* gates;        // packed (., G*H): the gates' values on return; may be the memory of x; or null
  long first_row;  // the packed row at which x, gates and kept begin
  E* kept;         // packed (., H): LSTM c, GRU (reset after) u; or null
  E* output;       // (T, B, P), rows past a row's end are not written; or packed; or null
  T *h, *c;        // (B, P), (B, H): state before this call on entry, after it on return
  const E *initial_h, *initial_c;
  const E *weight_hh, *weight_n, *weight_hr;  // packed by pack_forward
  const T* bias;                              // likewise
  const int64_t* ids;  // packed (.), from row 0: which row of x; or null; for all cells but GRU (reset before)
};

template <class E>
struct Backward : Layout {
  using T = Arithmetic<E>;
  long first_row;                  // the packed row at which gates and kept begin
  const E *gates, *kept, *output;  // as `forward` left them; of an LSTM, kept holds the step before the first one, too
  const E* grad_output;            // like output, or null
  T *grad_h, *grad_c;              // (B, P), (B, H): gradient of the state after this call on entry, before on return
  T *grad_initial_h, *grad_initial_c;  // (B, .): resets add to them; null without resets
  const E *initial_h, *initial_c;
  long first_grad_row;  // the packed row at which the five below begin
  long grad_stride;     // from one row of grad_gates to the next
  E* grad_gates;        // packed (., G*H): da; GRU (reset after) (., 4H): da_n, da_r, da_z, da_n * r
  E* h_prev;            // packed (., P) or null
  E* extra;             // packed (., H): r * h_prev of GRU (reset before), m of a projected LSTM
  E* grad_hidden;       // packed (., P): dh of a projected LSTM
  const E *weight_hh, *weight_n, *weight_hr;  // packed by pack_backward
};

// Sizes, in elements, of the packed weights.
struct PackedSizes {
  long weight_hh, weight_n, weight_hr, bias;
};

// One instruction set's code for one element type. Functions return false when memory runs out.
template <class E>
struct Kernels {
  using T = Arithmetic<E>;
  PackedSizes (*forward_sizes)(const Layout&);
  PackedSizes (*backward_sizes)(const Layout&);
  void (*pack_forward)(const Layout&, const T* weight_hh, const T* weight_hr, const T* bias_ih, const T* bias_hh,
                       E* packed_hh, E* packed_n, E* packed_hr, T* packed_bias);
  void (*pack_backward)(const Layout&, const T* weight_hh, const T* weight_hr, E* packed_hh, E* packed_n, E* packed_hr);
  // One call, or both directions of a layer at once: two calls that differ in their arrays and in which way they run.
  bool (*forward)(const Forward<E>* calls, int count);
  bool (*backward)(const Backward<E>* calls, int count);

  // The products outside the time loop: element (k, column) of the packed matrix is at
  // source[column * column_stride + k * depth_stride]; `add_outer` adds a^T b to sum and the sums of a's rows to bias;
  // `add_by_id` adds each row of a to row ids[row] of table (V, columns).
  long (*columns_size)(long columns, long depth);
  void (*pack_columns)(long columns, long depth, const T* source, long column_stride, long depth_stride, E* packed,
                       int threads);
  void (*multiply_rows_by)(long rows, long depth, long columns, const E* a, long a_stride, const E* packed, T* out,
                           long out_stride, int threads);
  void (*multiply_rows_and_round)(long rows, long depth, long columns, const E* a, long a_stride, const E* packed,
                                  E* out, long out_stride, int threads);
  bool (*add_outer)(long rows, long left, long right, const E* a, long a_stride, const E* b, long b_stride, T* sum,
                    T* bias, int threads);
  void (*add_by_id)(long rows, long columns, const E* a, long a_stride, const int64_t* ids, T* table, int threads);
};

template <class T>
struct VariantKernels;  // variants.h

template <class T>
struct Cotangents;  // cotangents.h

struct StreamKernels;  // stream.h

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<Bf16> bf16;
  const VariantKernels<float>* variants_f32;
  const VariantKernels<double>* variants_f64;
  bool (*cotangent_norms_f32)(const Cotangents<float>&);
  bool (*cotangent_norms_f64)(const Cotangents<double>&);
  const StreamKernels* stream;
};

namespace avx512_bf16 {
extern const InstructionSet instruction_set;
}
namespace avx512 {
extern const InstructionSet instruction_set;
}
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace generic {
extern const InstructionSet instruction_set;
}

}  // namespace throughtime
