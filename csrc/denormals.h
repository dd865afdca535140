// Numbers below the smallest that have a whole significand: 1.2e-38 in float, 2.2e-308 in double. Gradients of a loss far away die
// out into them, and then each operation costs many CPUs a hundred cycles. What is computed here takes them for zero.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace throughtime {

// The calling thread's floating-point settings. Where they can't be reached there are none, and denormals are kept.
using FloatSettings = uint64_t;

#if defined(__SSE__)
constexpr FloatSettings flushing = 0x8040;  // results to zero (FTZ), operands too (DAZ)
inline FloatSettings float_settings() { return _mm_getcsr(); }
inline void set_float_settings(FloatSettings settings) { _mm_setcsr(static_cast<unsigned>(settings)); }
#elif defined(__aarch64__)
constexpr FloatSettings flushing = FloatSettings{1} << 24;  // FPCR.FZ: results and operands
inline FloatSettings float_settings() {
  FloatSettings settings;
  asm volatile("mrs %0, fpcr" : "=r"(settings));
  return settings;
}
inline void set_float_settings(FloatSettings settings) { asm volatile("msr fpcr, %0" : : "r"(settings) : "memory"); }
#else
constexpr FloatSettings flushing = 0;
inline FloatSettings float_settings() { return 0; }
inline void set_float_settings(FloatSettings) {}
#endif

// While one of these lives, its thread takes denormals for zero; then its settings are what they were.
class FlushDenormals {
 public:
  FlushDenormals() : before_(float_settings()) { set_float_settings(before_ | flushing); }
  FlushDenormals(const FlushDenormals&) = delete;
  ~FlushDenormals() { set_float_settings(before_); }

 private:
  const FloatSettings before_;
};

// Take them for zero from now on in the threads that torch's own operators have here, `threads` of them; returns what each had.
std::vector<FloatSettings> flush_denormals(int threads);

// Give each of them its settings again, and what the calling thread had to those that came later, where there are more by now.
void restore_denormals(int threads, const std::vector<FloatSettings>& before);

}  // namespace throughtime
