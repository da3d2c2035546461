#include "grid.h"

#include <algorithm>
#include <cmath>

namespace baseq {

RangeGrid grid_over(const Extremes& range, float clip, const QuantSpec& spec) {
  const auto count = static_cast<float>(num_steps(spec));
  const auto low_code = static_cast<float>(code_min(spec)), high_code = static_cast<float>(code_max(spec));
  const auto smallest = static_cast<float>(smallest_scale(spec));
  RangeGrid result{.grid = {.low = low_code, .high = high_code}};
  const auto set_scale = [&](float scale) {
    result.clamped = scale < smallest;
    result.grid.scale = round_to_scale_dtype(result.clamped ? smallest : scale, spec.scale_dtype);
  };
  if (spec.symmetric) {
    set_scale(std::max(clip * range.high, -(clip * range.low)) / (count / 2));
  } else if (spec.dynamic) {
    const float middle = (range.high + range.low) / 2, half = (range.high - range.low) / 2;
    result.grid.base = middle - clip * half;
    set_scale((middle + clip * half - result.grid.base) / count);
    result.grid.low = 0;
    result.grid.high = count;
  } else {
    const float high = clip * std::max(range.high, 0.0F), low = clip * std::min(range.low, 0.0F);
    set_scale((high - low) / count);
    result.grid.zero_point = std::clamp(std::nearbyint(low_code - low / result.grid.scale), low_code, high_code);
  }
  return result;
}

}  // namespace baseq
