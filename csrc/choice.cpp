#include "choice.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace throughtime {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// As Python writes it, more or less.
std::string nicely(double value) {
  char text[32];
  snprintf(text, sizeof text, "%.15g", value);
  return text;
}

// What is out of its range would have memory read that isn't there, or numbers compared that have no order.
ChoiceOptions checked(const ChoiceOptions& it) {
  const auto check = [](bool is_right, const char* name, double value, const char* expected) {
    if (!is_right) throw std::invalid_argument(name + (" = " + nicely(value)) + "; expected " + expected);
  };
  const auto is_share = [](double value) { return value >= 0 && value <= 1; };
  check(it.temperature > 0 && it.temperature < infinity, "temperature", it.temperature, "a number above 0");
  check(it.top_k >= 0, "top_k", static_cast<double>(it.top_k), "a number of tokens, or 0 for off");
  check(is_share(it.top_p), "top_p", it.top_p, "a probability, or 0 for off");
  check(is_share(it.min_p), "min_p", it.min_p, "a probability, or 0 for off");
  check(is_share(it.typical_p), "typical_p", it.typical_p, "a probability, or 0 for off");
  check(it.repetition_penalty > 0 && it.repetition_penalty < infinity, "repetition_penalty", it.repetition_penalty,
        "a number above 0; 1 is off");
  check(it.no_repeat_ngram >= 0, "no_repeat_ngram", static_cast<double>(it.no_repeat_ngram),
        "a number of tokens, or 0 for off");
  return it;
}

}  // namespace

Choice::Choice(long vocabulary, const ChoiceOptions& options)
    : logits(vocabulary), options_(checked(options)), p_(vocabulary), surprise_(vocabulary), sorted_(vocabulary),
      places_(vocabulary), seen_(vocabulary) {
  if (vocabulary < 1) throw std::invalid_argument("there are no tokens to choose from");
}

void Choice::see(const int64_t* tokens, long count, long more) {
  for (long i = 0; i < count; ++i)
    if (tokens[i] < 0 || tokens[i] >= vocabulary())
      throw std::out_of_range("token " + std::to_string(tokens[i]) + "; expected one from 0 to " +
                              std::to_string(vocabulary() - 1));
  history_.reserve(history_.size() + count + more);
  for (long i = 0; i < count; ++i) see(tokens[i]);
}

void Choice::see(int64_t token) {
  history_.push_back(token);
  seen_[token] = 1;
}

int64_t Choice::choose(const uint8_t* forbidden, double chance) {
  const long count = static_cast<long>(p_.size());
  for (long i = 0; i < count; ++i) p_[i] = forbidden[i] ? -infinity : static_cast<double>(logits[i]);
  penalise();
  long likeliest = 0;
  for (long i = 0; i < count; ++i) {
    if (std::isnan(p_[i])) return no_number;
    if (p_[i] > p_[likeliest]) likeliest = i;
  }
  const double most = p_[likeliest];
  if (most == -infinity) return none_left;
  if (options_.greedy) return likeliest;
  if (most == infinity) return no_number;  // less itself it is none
  for (double& p : p_) p = (p - most) / options_.temperature;
  limit();
  const double wanted = chance * sum();
  double below = 0;
  long last = 0;
  for (long i = 0; i < count; ++i) {
    if (p_[i] <= 0) continue;
    last = i;
    below += p_[i];
    if (below > wanted) return i;
  }
  return last;
}

void Choice::penalise() {
  const double penalty = options_.repetition_penalty;
  if (penalty != 1.0)
    for (size_t i = 0; i < p_.size(); ++i)
      if (seen_[i]) p_[i] = p_[i] > 0 ? p_[i] / penalty : p_[i] * penalty;
  const long n = options_.no_repeat_ngram, length = static_cast<long>(history_.size());
  if (n == 0 || length < n) return;
  const int64_t* const last = history_.data() + length - (n - 1);
  for (long i = 0; i + n <= length; ++i)
    if (std::equal(last, last + n - 1, history_.data() + i)) p_[history_[i + n - 1]] = -infinity;
}

// From logits, of which the largest is zero, to the probabilities of those that the limits leave.
void Choice::limit() {
  if (options_.top_k && options_.top_k < static_cast<long>(p_.size())) keep_largest(options_.top_k);
  for (double& p : p_) p = std::exp(p);
  const double all = sum();
  for (double& p : p_) p /= all;
  if (options_.top_p) keep_first([this](int32_t i, int32_t j) { return p_[i] > p_[j]; }, options_.top_p);
  if (options_.min_p) {
    const double least = options_.min_p * *std::max_element(p_.begin(), p_.end());
    for (double& p : p_)
      if (p < least) p = 0;
  }
  if (options_.typical_p) {
    const double left = sum();
    double mean = 0;
    for (size_t i = 0; i < p_.size(); ++i) {
      p_[i] /= left;
      surprise_[i] = -std::log(std::max(p_[i], std::numeric_limits<double>::min()));
      mean += p_[i] * surprise_[i];
    }
    for (double& surprise : surprise_) surprise = std::fabs(surprise - mean);
    keep_first([this](int32_t i, int32_t j) { return surprise_[i] < surprise_[j]; }, options_.typical_p);
  }
}

// Those that are as large as the last of so many stay, too.
void Choice::keep_largest(long count) {
  sorted_ = p_;
  std::nth_element(sorted_.begin(), sorted_.begin() + (count - 1), sorted_.end(), std::greater<>());
  const double least = sorted_[count - 1];
  for (double& p : p_)
    if (p < least) p = -infinity;
}

// Those that come first, and together have the probability; the one that reaches it is still in.
template <class Before>
void Choice::keep_first(Before before, double mass) {
  const double all = sum();
  long count = 0;
  for (size_t i = 0; i < p_.size(); ++i)
    if (p_[i] > 0) places_[count++] = static_cast<int32_t>(i);
  std::sort(places_.begin(), places_.begin() + count,
            [&](int32_t i, int32_t j) { return before(i, j) || (!before(j, i) && i < j); });
  double together = 0;
  for (long place = 0; place < count; ++place) {
    const double share = p_[places_[place]] / all;
    together += share;
    if (together - share >= mass) p_[places_[place]] = 0;
  }
}

double Choice::sum() const {
  double sum = 0;
  for (const double p : p_) sum += p;
  return sum;
}

}  // namespace throughtime
