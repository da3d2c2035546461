#pragma once

#include <cstdint>

/// The inner loops of fake quantization over one group of float32 values: plain loops that the compiler vectorizes, in
/// one version for each instruction set.
namespace baseq {

/// position = (u - base) / scale + zero_point, code = clamp(round(position), low, high), halves to even,
/// value = (code - zero_point) * scale + base.
struct Grid {
  float scale = 1, zero_point = 0, base = 0;
  float low = 0, high = 0;
};

/// u = gain * x - shift; a null gain is 1, a null shift 0.
void apply_gain_and_shift(const float* x, const float* gain, const float* shift, int64_t n, float* u);

struct Extremes {
  float low = 0, high = 0;
  int64_t low_at = 0, high_at = 0;  ///< the first element with this value
};
/// NaN is skipped.
Extremes find_extremes(const float* u, int64_t n);
/// The same without the places.
Extremes find_range(const float* u, int64_t n);

/// out = value (+ added when it is not null). NaN stays NaN.
void fake_quantize_group(const float* u, int64_t n, const Grid& grid, const float* added, float* out);

struct GridGradient {
  double scale = 0;  ///< d loss / d scale at fixed base and zero point
  double outside =
      0;  ///< sum of the gradients of clipped elements: d loss / d base, and -1 / scale of that of zero_point
};
/// Straight-through: du = grad where the code was not clipped and zero elsewhere.
GridGradient fake_quantize_group_backward(const float* u, const float* grad, int64_t n, const Grid& grid, float* du);

/// The way back through u = gain * x - shift, accumulated over rows; null outputs are left out. `grad` is what `shift`
/// receives from being added back after quantization, null when it is not.
void gain_and_shift_backward(const float* x, const float* du, const float* grad, const float* gain, int64_t n,
                             float* x_grad, float* gain_grad, float* shift_grad);

}  // namespace baseq
