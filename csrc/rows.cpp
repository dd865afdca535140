#include "rows.h"

#include <new>

namespace throughtime {

bool plan_rows(const int64_t* lengths, long batch, long steps, int64_t* order, int64_t* rows, int64_t* first_row,
               int64_t* index) {
  int64_t* const next_rank = new (std::nothrow) int64_t[steps + 1]();  // of the next row of each length
  if (!next_rank) return false;
  for (long t = 0; t < steps; ++t) rows[t] = 0;
  for (long b = 0; b < batch; ++b)
    if (lengths[b]) ++rows[lengths[b] - 1];
  for (long t = steps - 1; t >= 0; --t) {
    next_rank[t] = rows[t] += t + 1 < steps ? rows[t + 1] : 0;
  }
  for (long b = 0; b < batch; ++b) order[next_rank[lengths[b]]++] = b;
  int64_t row = 0;
  for (long t = 0; t < steps; ++t) {
    first_row[t] = row;
    for (long rank = 0; rank < rows[t]; ++rank) index[row++] = t * batch + order[rank];
  }
  delete[] next_rank;
  return true;
}

}  // namespace throughtime
