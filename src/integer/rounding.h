#pragma once

#include <cstdint>

#include "../quant/grid.h"

/// How rows become codes, whatever they are codes of.
namespace baseq {

/// Rounds to the nearest whole number, halves to even; |value| < 2^22.
[[gnu::always_inline]] inline float round_to_even(float value) {
  constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23, whose last bit is worth 1
  return (value + kRounder) - kRounder;
}

bool all_finite(const float* values, int64_t n);

/// The codes of n values, less `offset`, each in a byte. Returns their sum.
int32_t round_to_grid(const float* values, int64_t n, const Grid& on, float offset, int8_t* codes);

}  // namespace baseq
