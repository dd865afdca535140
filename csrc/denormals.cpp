#include "denormals.h"

#include "threads.h"

namespace throughtime {

std::vector<FloatSettings> flush_denormals(int threads) {
  std::vector<FloatSettings> before(threads < 1 ? 1 : threads, float_settings());
  run_in_each(
      threads,
      [](void* context, int member) {
        FloatSettings& mine = (*static_cast<std::vector<FloatSettings>*>(context))[member];
        mine = float_settings();
        set_float_settings(mine | flushing);
      },
      &before);
  return before;
}

void restore_denormals(int threads, const std::vector<FloatSettings>& before) {
  std::vector<FloatSettings> all = before;
  if (static_cast<int>(all.size()) < threads) all.resize(threads, before.at(0));
  run_in_each(
      static_cast<int>(all.size()),
      [](void* context, int member) { set_float_settings((*static_cast<std::vector<FloatSettings>*>(context))[member]); },
      &all);
}

}  // namespace throughtime
