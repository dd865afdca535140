// A model that is stepped: its weights, packed once, and a step of some of its streams. Compiled once for each instruction set.
//
// The products are those of the layers (product.h), piece by piece in the same order, so that a stream in float32 has the bits
// of a long call. Nothing here allocates: who calls brings states, scratch and output.
#pragma once

#include <cstdint>

#include "request.h"

namespace throughtime {

// Each by the name that Python has for it.
enum class Precision : int { float32, bfloat16, int8 };
constexpr const char* precision_names[] = {"float32", "bfloat16", "int8"};

// The deepest product of int8 whose sum an int32_t holds, whatever the numbers are.
constexpr long deepest_int8 = INT32_MAX / (127 * 127);

// W (columns, depth), packed for products a . W^T. Without columns there is none.
struct Matrix {
  long columns = 0, depth = 0;
  const void* packed = nullptr;
  const float* scale = nullptr;     // of int8, (columns): what one unit of a weight stands for
  const int32_t* offset = nullptr;  // likewise: 128 times the sum of a column's units
};

// A linear layer, or a recurrent one by its cell's name.
enum class StageKind : int { linear, rnn_tanh, rnn_relu, lstm, gru, gru_reset_before, mgu };
constexpr const char* stage_names[] = {"linear", "rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before", "mgu"};

// A layer. Vectors are padded with zeros to whole panels; those that aren't there are null, but for bias_ih, which is zeros then.
struct Stage {
  StageKind kind;
  Facts facts;  // of the cell
  long input, hidden, projected;  // I, H, and P or 0; of a linear layer `hidden` is the output
  Matrix weight_ih, weight_hh, weight_n, weight_hr;  // n: of the last gate, where that meets what another makes of h
  const float *bias_ih, *bias_hh, *bias_n;
  long h_at, c_at;  // where in a stream's state its h and c begin
  // Variants compute in another order, as the layers do: biases come after the products.
  bool is_variant, is_coupled;
  const float *weight_ch, *gain_ih, *gain_hh, *gain_c, *shift_c;
  float kept_h, kept_c;  // zoneout's expectation: the share of the old state that is kept

  bool is_recurrent() const { return kind != StageKind::linear; }
  long width() const { return projected ? projected : hidden; }  // of the output
  long gates() const { return facts.gates - is_coupled; }
  bool has_last() const { return facts.joint < facts.gates; }
  long joint() const { return gates() - has_last(); }  // the gates that meet h itself
};

struct StreamModel {
  Precision precision;
  const Stage* stages;
  int count;
  int readout;       // the stages from this one on have no state
  long state_stride;  // floats from one stream's state to the next
  // What token ids choose a row of: what the first stage reads, or what its product would be; null where it reads vectors.
  const float* table;
  long table_stride;
  bool table_is_product;

  long input() const { return stages[0].input; }
  long output() const { return stages[count - 1].width(); }
};

// As many steps of as many streams pass a stage at once.
constexpr long most_positions = 48;

struct StreamCall {
  long steps, rows;       // T, and how many streams take part
  const int64_t* which;   // (rows,): which ones, or null: the first `rows`
  float* states;
  const float* x;         // (T, rows, I), or null
  const int64_t* ids;     // (T, rows), or null
  float* out;             // (T, rows, O), or (rows, O) if `last_only`
  bool last_only;
};

struct StreamKernels {
  // Bytes of a packed matrix, and packing: of int8 `scale` and `offset` are written too.
  long (*packed_bytes)(Precision, long columns, long depth);
  void (*pack)(Precision, long columns, long depth, const float* source, void* packed, float* scale, int32_t* offset);
  // out (rows, columns of product, at `stride`) = start + x . W^T: to make a table with, and for measurements.
  void (*multiply)(const StreamModel&, const Matrix&, const float* start, long rows, const float* x, float* out,
                   long stride, char* scratch);
  // Rows [first, first + count) of a call; `scratch` has `scratch_bytes(model)`, zeros at first.
  long (*scratch_bytes)(const StreamModel&);
  void (*step)(const StreamModel&, const StreamCall&, long first, long count, char* scratch);
};

}  // namespace throughtime
