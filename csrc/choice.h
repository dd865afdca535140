// Which token comes next: `Sampling.choose` of src/throughtime/lm/generation.py, with the same limits in the same order and in double
// precision, so that the same chance chooses the same token.
#pragma once

#include <cstdint>
#include <vector>

namespace throughtime {

struct ChoiceOptions {
  double temperature;
  long top_k;                      // 0 is off, as in all below
  double top_p, min_p, typical_p;
  double repetition_penalty;       // 1 is off
  long no_repeat_ngram;
  bool greedy;
};

class Choice {
 public:
  static constexpr long none_left = -1, no_number = -2;

  // Throws std::invalid_argument where an option is out of its range.
  Choice(long vocabulary, const ChoiceOptions& options);

  // The tokens so far; `more` will come, for which room is made. Throws std::out_of_range where there is no such token.
  void see(const int64_t* tokens, long count, long more);
  void see(int64_t token);  // which there is

  // Choose by `logits`: no token that is forbidden (V,), and by chance in [0, 1). Or one of the above.
  int64_t choose(const uint8_t* forbidden, double chance);

  long vocabulary() const { return static_cast<long>(logits.size()); }

  std::vector<float> logits;  // (V,), of the next token

 private:
  void penalise();
  void limit();
  void keep_largest(long count);
  template <class Before>
  void keep_first(Before before, double mass);
  double sum() const;

  const ChoiceOptions options_;
  std::vector<double> p_, surprise_;  // (V,): logits, then probabilities
  std::vector<double> sorted_;
  std::vector<int32_t> places_;
  std::vector<uint8_t> seen_;
  std::vector<int64_t> history_;
};

}  // namespace throughtime
