// A cell's variant through time: what a call says. The loop itself is variants.cpp. Cells without variants have a loop of
// their own (sequence.h), in which a unit's gates never leave the registers between the product and the nonlinearities.
#pragma once

#include "sequence.h"

namespace throughtime {

// One pass over some steps; parameters as torch has them, null where there are none. T is float or double.
template <class T>
struct Variant : Layout {
  explicit Variant(const Layout& layout) : Layout(layout) {}

  bool is_coupled = false;  // LSTM: the gates are f g o, and i = 1 - f

  const T *bias_ih = nullptr, *bias_hh = nullptr, *weight_ch = nullptr;
  const T *gain_ih = nullptr, *gain_hh = nullptr, *gain_c = nullptr, *shift_c = nullptr;
  const T *weight_hh = nullptr, *weight_n = nullptr, *weight_hr = nullptr;  // packed by pack_columns, for this direction

  const uint8_t *zoneout_h = nullptr, *zoneout_c = nullptr;  // (T, B, P), (T, B, H), or null
  T kept_h = 0, kept_c = 0;                                  // without a mask, the share of the old state that is kept
  const T* recurrent_dropout = nullptr;                      // (B, P) or null

  const T *initial_h = nullptr, *initial_c = nullptr;

  // Packed; they begin at first_row. Written by the forward pass, read by both. Of an LSTM, `kept` holds the step before the
  // first one, too, where the backward pass reads it.
  long first_row = 0;
  T* x = nullptr;      // (., G*H): W_ih x on entry; may be the memory of `gates`, but not with layer normalisation
  T* gates = nullptr;  // (., G*H): the gates' values; of an RNN its h, before zoneout
  T* u = nullptr;      // (., G*H) with layer normalisation, or null: W_hh h
  T* norms = nullptr;  // (., norms_width) with layer normalisation, or null: mean and scale of x, of u, and of c or of U_n (r * h)
  T* kept = nullptr;   // (., H): LSTM c, GRU (reset after) what r multiplies; or null
  T* output = nullptr;  // (T, B, P), rows past a row's end are not written; or packed; forward: or null

  T *h = nullptr, *c = nullptr;  // forward: (B, P), (B, H), state before this call on entry, after it on return

  const T* grad_output = nullptr;              // like output, or null
  T *grad_h = nullptr, *grad_c = nullptr;      // gradient of the state after this call on entry, before it on return
  T *grad_initial_h = nullptr, *grad_initial_c = nullptr;  // resets add to them

  // Packed; they begin at first_grad_row, and the first two have grad_stride from row to row.
  long first_grad_row = 0, grad_stride = 0;
  T* grad_ih = nullptr;      // (., G*H): gradient of W_ih x
  T* grad_hh = nullptr;      // (., G*H): gradient of W_hh h; the same array where they are the same
  T* h_in = nullptr;         // (., P): h as it enters W_hh, or null
  T* extra = nullptr;        // (., H): r * h of a GRU (reset before), m of a projected LSTM
  T* grad_hidden = nullptr;  // (., P): dh of a projected LSTM

  // Sums over all rows, one array for each of `most_groups` groups; each has a row of sum_stride, H in whole cache lines, for: the G gates'
  // gradients, da_n * r of a GRU (reset after), gain_ih (G), gain_hh (G), gain_c, shift_c, weight_ch (3).
  T* sums = nullptr;
  long sum_stride = 0;

  long gates_count() const { return cell == Cell::lstm && is_coupled ? 3 : gate_count(cell); }
  long norms_width() const { return cell == Cell::lstm || cell == Cell::gru_reset_before ? 6 : 4; }
  long sum_rows() const { return 3 * gates_count() + 6; }
};

// One instruction set's code for one element type. Functions return false when memory runs out.
template <class T>
struct VariantKernels {
  bool (*forward)(const Variant<T>&);
  bool (*backward)(const Variant<T>&);
  long (*most_groups)(const Layout&);
};

}  // namespace throughtime

#if defined(THROUGHTIME_ISA)
namespace throughtime::THROUGHTIME_ISA {
extern const VariantKernels<float> variants_f32;
extern const VariantKernels<double> variants_f64;
}  // namespace throughtime::THROUGHTIME_ISA
#endif
