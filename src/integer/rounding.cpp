#include "rounding.h"

#include <cfloat>
#include <cmath>

namespace baseq {

__attribute__((target_clones("avx512f", "avx2", "default"))) bool all_finite(const float* values, int64_t n) {
  int32_t finite = 0;
  for (int64_t i = 0; i < n; ++i) finite += std::abs(values[i]) <= FLT_MAX ? 1 : 0;
  return finite == n;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) int32_t round_to_grid(const float* values, int64_t n,
                                                                                   const Grid& on, float offset,
                                                                                   int8_t* codes) {
  const Grid grid = on;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    float position = (values[i] - grid.base) / grid.scale;
    position = position < grid.low ? grid.low : position;
    position = position > grid.high ? grid.high : position;
    const auto code = static_cast<int32_t>(round_to_even(position) - offset);
    codes[i] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}

}  // namespace baseq
