#include "grid_kernels.h"

#include <algorithm>
#include <limits>

namespace baseq {
namespace {

/// Sixteen values side by side; the compiler splits them where registers are shorter. Reductions need it, because
/// without it the order of a floating-point sum or maximum is fixed.
constexpr int64_t kLanes = 16;
using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using IntLanes = int32_t __attribute__((vector_size(64), aligned(4), may_alias));

/// Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, halves to even.
constexpr float kRounder = 12582912.0F;

constexpr int64_t kSegment = 1024;

/// Sums in sixteen lanes, carried on in float64 by the callers from segment to segment.
__attribute__((always_inline)) inline double sum_of(const float* terms, int64_t n) {
  Lanes sums{};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) sums += *reinterpret_cast<const Lanes*>(terms + i);
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (int64_t i = whole; i < n; ++i) total += terms[i];
  return total;
}

}  // namespace

__attribute__((target_clones("avx512f", "avx2", "default"))) void apply_gain_and_shift(const float* x,
                                                                                       const float* gain,
                                                                                       const float* shift, int64_t n,
                                                                                       float* __restrict u) {
  if (gain != nullptr && shift != nullptr) {
    for (int64_t i = 0; i < n; ++i) u[i] = gain[i] * x[i] - shift[i];
  } else if (gain != nullptr) {
    for (int64_t i = 0; i < n; ++i) u[i] = gain[i] * x[i];
  } else if (shift != nullptr) {
    for (int64_t i = 0; i < n; ++i) u[i] = x[i] - shift[i];
  } else {
    std::copy_n(x, n, u);
  }
}

__attribute__((target_clones("avx512f", "avx2", "default"))) Extremes find_extremes(const float* u, int64_t n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float low[kLanes], high[kLanes];
  int32_t low_at[kLanes], high_at[kLanes];
  Lanes lows = Lanes{} + kInfinity, highs = Lanes{} - kInfinity;
  IntLanes lows_at{}, highs_at{}, at{};
  for (int64_t lane = 0; lane < kLanes; ++lane) at[lane] = static_cast<int32_t>(lane);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes value = *reinterpret_cast<const Lanes*>(u + i);
    const IntLanes is_low = value<lows, is_high = value> highs;
    lows = is_low ? value : lows;
    lows_at = is_low ? at : lows_at;
    highs = is_high ? value : highs;
    highs_at = is_high ? at : highs_at;
    at += static_cast<int32_t>(kLanes);
  }
  *reinterpret_cast<Lanes*>(low) = lows;
  *reinterpret_cast<Lanes*>(high) = highs;
  *reinterpret_cast<IntLanes*>(low_at) = lows_at;
  *reinterpret_cast<IntLanes*>(high_at) = highs_at;
  Extremes extremes{low[0], high[0], low_at[0], high_at[0]};
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    if (low[lane] < extremes.low || (low[lane] == extremes.low && low_at[lane] < extremes.low_at)) {
      extremes.low = low[lane];
      extremes.low_at = low_at[lane];
    }
    if (high[lane] > extremes.high || (high[lane] == extremes.high && high_at[lane] < extremes.high_at)) {
      extremes.high = high[lane];
      extremes.high_at = high_at[lane];
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    if (u[i] < extremes.low) {
      extremes.low = u[i];
      extremes.low_at = i;
    }
    if (u[i] > extremes.high) {
      extremes.high = u[i];
      extremes.high_at = i;
    }
  }
  return extremes;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) Extremes find_range(const float* u, int64_t n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Lanes lows = Lanes{} + kInfinity, highs = Lanes{} - kInfinity;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes value = *reinterpret_cast<const Lanes*>(u + i);
    lows = value < lows ? value : lows;
    highs = value > highs ? value : highs;
  }
  Extremes extremes{kInfinity, -kInfinity, 0, 0};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    extremes.low = std::min(extremes.low, static_cast<float>(lows[lane]));
    extremes.high = std::max(extremes.high, static_cast<float>(highs[lane]));
  }
  for (int64_t i = whole; i < n; ++i) {
    extremes.low = u[i] < extremes.low ? u[i] : extremes.low;
    extremes.high = u[i] > extremes.high ? u[i] : extremes.high;
  }
  return extremes;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void fake_quantize_group(const float* u, int64_t n,
                                                                                      const Grid& grid,
                                                                                      const float* added,
                                                                                      float* __restrict out) {
  const float scale = grid.scale, zero_point = grid.zero_point, base = grid.base, low = grid.low, high = grid.high;
  for (int64_t i = 0; i < n; ++i) {
    float position = (u[i] - base) / scale + zero_point;
    position = position < low ? low : position;
    position = position > high ? high : position;
    const float code = (position + kRounder) - kRounder;
    out[i] = (code - zero_point) * scale + base;
  }
  if (added != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] += added[i];
  }
}

__attribute__((target_clones("avx512f", "avx2", "default"))) GridGradient fake_quantize_group_backward(
    const float* u, const float* grad, int64_t n, const Grid& grid, float* __restrict du) {
  const float scale = grid.scale, zero_point = grid.zero_point, base = grid.base, low = grid.low, high = grid.high;
  float scale_terms[kSegment], outside_terms[kSegment];
  GridGradient result;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    const int64_t length = std::min(kSegment, n - begin);
    for (int64_t k = 0; k < length; ++k) {
      const float g = grad[begin + k];
      const float position = (u[begin + k] - base) / scale + zero_point;
      // One code beyond each end is enough to tell the clipped elements.
      float bounded = position < low - 1 ? low - 1 : position;
      bounded = bounded > high + 1 ? high + 1 : bounded;
      const float rounded = (bounded + kRounder) - kRounder;
      float code = rounded < low ? low : rounded;
      code = code > high ? high : code;
      const bool inside = code == rounded;
      du[begin + k] = inside ? g : 0.0F;
      scale_terms[k] = g * (inside ? code - position : code - zero_point);
      outside_terms[k] = inside ? 0.0F : g;
    }
    result.scale += sum_of(scale_terms, length);
    result.outside += sum_of(outside_terms, length);
  }
  return result;
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void gain_and_shift_backward(
    const float* x, const float* du, const float* grad, const float* gain, int64_t n, float* __restrict x_grad,
    float* __restrict gain_grad, float* __restrict shift_grad) {
  if (x_grad != nullptr && gain != nullptr) {
    for (int64_t i = 0; i < n; ++i) x_grad[i] = du[i] * gain[i];
  } else if (x_grad != nullptr) {
    std::copy_n(du, n, x_grad);
  }
  if (gain_grad != nullptr) {
    for (int64_t i = 0; i < n; ++i) gain_grad[i] += du[i] * x[i];
  }
  if (shift_grad != nullptr && grad != nullptr) {
    for (int64_t i = 0; i < n; ++i) shift_grad[i] += grad[i] - du[i];
  } else if (shift_grad != nullptr) {
    for (int64_t i = 0; i < n; ++i) shift_grad[i] -= du[i];
  }
}

}  // namespace baseq
