// Which rows take part in which step, longest first: torch's PackedSequence order.
#pragma once

#include <cstdint>

namespace throughtime {

// From lengths (B,), each in 0 ... T: order (B,), rank -> column of the batch, equal lengths in the batch's order; rows (T,)
// that take part in each step; first_row (T,), where they begin in packed arrays; index (sum of the lengths,), the row of
// the padded (T * B, .) array for each row of the packed one. Returns false when memory runs out.
bool plan_rows(const int64_t* lengths, long batch, long steps, int64_t* order, int64_t* rows, int64_t* first_row,
               int64_t* index);

}  // namespace throughtime
