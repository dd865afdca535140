// What is asked of the time loop: a layer in one direction, its sizes, and where its arrays are. Python says what, this side where:
// how weights are packed, what lies in which row and how gradients are added up is nobody else's business.
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

struct InstructionSet;

// What the code around the time loop must know of a cell. Its loops stand on a page of its own (cells/), which says all this.
struct Facts {
  const char* name;   // as Python calls it
  bool has_c;         // its state is (h, c)
  int gates;          // G
  int joint;          // the gates, from the first, whose part of W_hh meets h itself; a last one may meet what the others make of h
  bool saves_gates;   // whether the plain backward pass reads the gates' values, or makes do with the output
  bool keeps;         // H values more are kept for it: an LSTM's c, what a GRU's r multiplies
  // In a row of the plain backward loop's gradients the gates begin with the one of this number and go round; what W_hh meets
  // begins `offset_hh` gates later. So both products find what is theirs side by side where a gate has two gradients.
  int turned, offset_hh;

  // Layer normalisations in a step: of W_ih x, of W_hh h, and one more of c, or of what the last gate gets.
  int norms() const { return has_c || joint < gates ? 3 : 2; }
};

// Rows are sequences, by rank: longest first, so that those which take part in step t are the first `rows[t]` of them.
// Arrays called packed hold only those, step after step: row `rank` of step t is at first_row[t] + rank, exactly as in
// torch's PackedSequence. Without lengths rows[t] = B, and packed and (T, B, .) are one.
struct Layout {
  const InstructionSet* set;  // whose code lays out, packs and runs
  int cell;        // its number among an instruction set's cells
  Facts facts;
  int gate_count;  // G: of an LSTM with coupled gates (f g o) one less than the facts say
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
  bool has_last() const { return facts.joint < facts.gates; }
  int joint() const { return has_last() ? facts.joint : gate_count; }
};

// A matrix of weights that rows are multiplied by: packed; or, where they are so few that packing it would take longer than their
// products, as torch has it, element (k, column j) at plain[j * stride + k]. No bit depends on which.
template <class E>
struct Weight {
  const E* packed = nullptr;
  const Arithmetic<E>* plain = nullptr;
  long stride = 0;
};

// What a variant adds to the plain cell; parameters as torch has them, null where there are none.
template <class E>
struct Variant {
  using T = Arithmetic<E>;
  const T *bias_ih = nullptr, *bias_hh = nullptr, *weight_ch = nullptr;
  const T *gain_ih = nullptr, *gain_hh = nullptr, *gain_c = nullptr, *shift_c = nullptr;
  const uint8_t *zoneout_h = nullptr, *zoneout_c = nullptr;  // (T, B, P), (T, B, H): where the old state is kept
  T share_h = 0, share_c = 0;                                // without a mask, the share of it that is kept
  const E* recurrent_dropout = nullptr;                      // (B, P)

  bool is_normalised() const { return gain_hh; }
};

// E: what products multiply, and what is kept for the backward pass. The carried state is of type Arithmetic<E>.
template <class E>
struct ForwardCall : Layout {
  using T = Arithmetic<E>;
  const Variant<E>* variant;  // or null
  long first_kept_row;  // the packed row at which x, and what is kept, begin
  T* x;            // packed (., G*H): W_ih x on entry, arbitrary on return; with ids, a table (V, G*H), not written to
  E* w;            // the same, in place of x, where it is normalised
  E* gates;        // packed (., G*H): the gates' values on return; may be the memory of x; or null. A variant of an RNN: h before zoneout
  E* kept;         // packed (., H), or null
  E* u;            // packed (., G*H), of W_hh h where that is normalised, or null
  T* norms;        // packed (., 2 norms): mean and scale of each normalisation, or null
  E* output;       // (T, B, P), rows past a row's end are not written; or packed; or null
  T *h, *c;        // (B, P), (B, H): state before this call on entry, after it on return
  const E *initial_h, *initial_c;
  Weight<E> weight_hh, weight_last, weight_hr;  // as pack_forward leaves them
  const T* bias;                                // packed likewise, of plain cells
  const int64_t* ids;  // packed (.), from row 0: which row of x; or null
};

template <class E>
struct BackwardCall : Layout {
  using T = Arithmetic<E>;
  const Variant<E>* variant;  // or null
  long first_kept_row;  // the packed row at which what the forward pass has kept begins
  const E *gates, *kept, *w, *u, *output;  // as `forward` left them; where there is c, kept holds the step before the first one, too
  const T* norms;
  const E* grad_output;            // like output, or null
  T *grad_h, *grad_c;              // (B, P), (B, H): gradient of the state after this call on entry, before on return
  T *grad_initial_h, *grad_initial_c;  // (B, .): resets add to them; null without resets
  const E *initial_h, *initial_c;
  Weight<E> weight_hh, weight_last, weight_hr;  // as pack_backward leaves them
  T* sums;                         // of a variant: see sum_rows

  long first_grad_row;  // the packed row at which the rest, which the loop writes, begins
  long grad_stride;     // from one row of the first two to the next
  E* grad_ih;           // packed (., G*H): gradient of W_ih x; of plain cells as the facts say
  E* grad_hh;           // packed (., G*H): gradient of W_hh h; may lie within the other, or be it
  E* h_in;              // packed (., P): h as it enters W_hh; null where the output tells
  E* extra;             // packed (., H): what the last gate's weights meet; m of a projected LSTM
  E* grad_hidden;       // packed (., P): dh of a projected LSTM
};

// A variant's gradients that are sums over all rows grow in the loop, in a place for each of `most_groups` groups. Each has a row, H
// in whole cache lines, for: the G gates' gradients; the last one's by W_hh, where that is another; gain_ih (G), gain_hh (G),
// gain_c, shift_c, weight_ch (3).
inline long sum_rows(const Layout& s) { return 3 * s.gate_count + 6; }
inline long sum_stride(const Layout& s) { return (s.hidden + 15) / 16 * 16; }

// Sizes, in elements, of the packed weights.
struct PackedSizes {
  long weight_hh, weight_last, weight_hr, bias;
};

// A direction's weights as torch has them, and where they go. Null where there are none, a bias where the loop adds it itself, and
// a place where weights are read as they lie.
template <class T>
struct CellWeights {
  const T *hh, *hr, *bias_ih, *bias_hh;
};

template <class E>
struct PackedWeights {
  E *hh, *last, *hr;
  Arithmetic<E>* bias;
};

// The weights as a pass takes them.
template <class E>
struct PassWeights {
  Weight<E> hh, last, hr;
};

// One instruction set's code for one element type. Functions return false when memory runs out.
template <class E>
struct Kernels {
  using T = Arithmetic<E>;
  PackedSizes (*forward_sizes)(const Layout&, bool is_variant);
  PackedSizes (*backward_sizes)(const Layout&);
  PassWeights<E> (*pack_forward)(const Layout&, const CellWeights<T>&, const PackedWeights<E>&);
  PassWeights<E> (*pack_backward)(const Layout&, const CellWeights<T>&, const PackedWeights<E>&);
  // One call, or both directions of a layer at once: two calls that differ in their arrays and in which way they run.
  bool (*forward)(const ForwardCall<E>* calls, int count);
  bool (*backward)(const BackwardCall<E>* calls, int count);
  bool (*forward_variant)(const ForwardCall<E>* calls, int count);
  bool (*backward_variant)(const BackwardCall<E>* calls, int count);
  bool (*reads_plain)(const Layout&);  // whether a forward pass reads weights as they lie
  long (*most_groups)(const Layout&);

  // The products outside the time loop: element (k, column) of the packed matrix is at
  // source[column * column_stride + k * depth_stride]; `add_outer` adds a^T b to sum and the sums of a's rows to bias;
  // `add_by_id` adds each row of a to row ids[row] of table (V, columns), whose rows are a stride apart.
  long (*columns_size)(long columns, long depth);
  void (*pack_columns)(long columns, long depth, const T* source, long column_stride, long depth_stride, E* packed,
                       int threads);
  void (*multiply_rows_by)(long rows, long depth, long columns, const E* a, long a_stride, const Weight<E>&, T* out,
                           long out_stride, int threads);
  void (*multiply_rows_and_round)(long rows, long depth, long columns, const E* a, long a_stride, const Weight<E>&,
                                  E* out, long out_stride, int threads);
  bool (*add_outer)(long rows, long left, long right, const E* a, long a_stride, const E* b, long b_stride, T* sum,
                    T* bias, int threads);
  void (*add_by_id)(long rows, long columns, const E* a, long a_stride, const int64_t* ids, T* table, long table_stride,
                    int threads);
};

template <class T>
struct Cotangents;  // cotangents.h

struct StreamKernels;  // stream.h

struct InstructionSet {
  const char* name;
  const Facts* cells;
  int cell_count;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<Bf16> bf16;
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
