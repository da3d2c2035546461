#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "baseq/quant/quantize.h"
#include "grid_kernels.h"

/// What the sources of this module share about the integer grid of a QuantSpec.
namespace baseq {

inline int64_t code_min(const QuantSpec& spec) { return -(int64_t{1} << (spec.num_bits - 1)); }
inline int64_t code_max(const QuantSpec& spec) { return (int64_t{1} << (spec.num_bits - 1)) - 1; }

/// Steps between the lowest and the highest code.
inline int64_t num_steps(const QuantSpec& spec) { return (int64_t{1} << spec.num_bits) - 1; }

/// Scales are clamped from below, so that a row without range gives codes and not NaN. Every value stays above zero
/// when it is rounded to the scale's type (the smallest float16 is 6e-8).
inline double smallest_scale(const QuantSpec& spec) {
  if (spec.dynamic && !spec.symmetric) return 1e-5;
  return spec.scale_dtype == at::kHalf ? 6e-8 : 1e-12;
}

/// `scale` as its storage type keeps it.
inline float round_to_scale_dtype(float scale, at::ScalarType dtype) {
  if (dtype == at::kHalf) return static_cast<float>(c10::Half(scale));
  if (dtype == at::kBFloat16) return static_cast<float>(c10::BFloat16(scale));
  return scale;
}

struct RangeGrid {
  Grid grid;
  bool clamped = false;  ///< the scale is smallest_scale, whatever the range
};
/// The grid that compute_qparams lays over one group. Dynamic asymmetric grids count their codes from zero at `base`,
/// the low end, which keeps the precision that a large real zero point would lose.
RangeGrid grid_over(const Extremes& range, float clip, const QuantSpec& spec);

/// Fake quantization over the range of each group of x, a dynamic asymmetric grid that counts from its low end as
/// grid_over() does, by tensor operations on any device. See compute_qparams for `clip`.
Tensor fake_quantize_from_base(const Tensor& x, const QuantSpec& spec, const Tensor& clip);

/// Throws c10::Error when a field of `spec` is out of range.
void check_spec(const char* who, const QuantSpec& spec);
/// Throws c10::Error for what check_spec refuses, and for a grid whose ranges come from each row as it passes.
void check_weight_spec(const char* who, const QuantSpec& spec);

}  // namespace baseq
