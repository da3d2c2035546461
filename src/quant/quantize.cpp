#include "baseq/quant/quantize.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <utility>

#include "cells.h"
#include "fused.h"
#include "grid.h"

namespace baseq {
namespace {

/// Quantization arithmetic runs in float32, in float64 for float64 tensors.
Tensor to_compute_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

/// A rounding whose gradient is the identity. The sum is exact: `rounded - x` has no bits below those of `x`.
Tensor straight_through(const Tensor& x, const Tensor& rounded) { return x + (rounded - x).detach(); }

/// x / scale + zero_point over [rows, groups, group_size].
Tensor to_grid(const Tensor& grouped, const QParams& qparams) {
  const Tensor scaled = grouped / qparams.scale.unsqueeze(-1);
  return qparams.zero_point.defined() ? scaled + qparams.zero_point.unsqueeze(-1) : scaled;
}

Tensor from_grid(const Tensor& codes, const QParams& qparams) {
  const Tensor centred = qparams.zero_point.defined() ? codes - qparams.zero_point.unsqueeze(-1) : codes;
  return centred * qparams.scale.unsqueeze(-1);
}

/// What of the minimum and what of the maximum of ranges [rows, groups] remains, by `clip`.
std::pair<Tensor, Tensor> ratios_of(const Tensor& clip, const Tensor& ranges, const QuantSpec& spec) {
  const int64_t ends = clip.dim() == 0 ? 1 : clip.size(-1);
  const Tensor low = clip.dim() == 0 ? clip : clip.select(-1, 0);
  TORCH_CHECK((ends == 1 || (ends == 2 && !spec.dynamic)) && at::is_expandable_to(low.sizes(), ranges.sizes()),
              "compute_qparams: clip is ", clip.sizes(), ", expected [", ranges.size(1), ", 1] or [", ranges.size(0),
              ", ", ranges.size(1), ", 1], or 2 in place of 1 on a static grid");
  return {low, ends == 2 ? clip.select(-1, 1) : low};
}

void check_qparams(const char* who, const Tensor& grouped, const QParams& qparams) {
  TORCH_CHECK(qparams.scale.defined() && qparams.scale.dim() == 2 && qparams.scale.size(0) == grouped.size(0) &&
                  qparams.scale.size(1) == grouped.size(1),
              who, ": scale is ", qparams.scale.defined() ? qparams.scale.sizes() : at::IntArrayRef{}, ", expected [",
              grouped.size(0), ", ", grouped.size(1), "]");
  TORCH_CHECK(!qparams.zero_point.defined() || qparams.zero_point.sizes() == qparams.scale.sizes(), who,
              ": zero point is ", qparams.zero_point.sizes(), " but scale is ", qparams.scale.sizes());
}

}  // namespace

void check_spec(const char* who, const QuantSpec& spec) {
  TORCH_CHECK(spec.num_bits >= 2 && spec.num_bits <= 8, who, ": num_bits is ", spec.num_bits, ", expected 2 to 8");
  TORCH_CHECK(spec.strategy != Strategy::kGroup || spec.group_size > 0, who, ": group_size is ", spec.group_size,
              ", expected a positive number with Strategy::kGroup");
  TORCH_CHECK(spec.scale_dtype == at::kFloat || spec.scale_dtype == at::kHalf || spec.scale_dtype == at::kBFloat16, who,
              ": scale_dtype is ", spec.scale_dtype, ", expected float32, float16 or bfloat16");
}

void check_weight_spec(const char* who, const QuantSpec& spec) {
  check_spec(who, spec);
  TORCH_CHECK(
      !spec.dynamic && spec.strategy != Strategy::kToken, who,
      ": the grid is one of activations (dynamic or Strategy::kToken), expected a static one by tensor, channel "
      "or group");
}

Tensor group_view(const Tensor& x, const QuantSpec& spec) {
  TORCH_CHECK(x.dim() >= 1, "group_view: tensor has no dimension, expected at least one");
  if (spec.strategy == Strategy::kTensor) return x.reshape({1, 1, x.numel()});
  const int64_t features = x.size(-1);
  const int64_t rows = x.numel() / std::max<int64_t>(features, 1);
  if (spec.strategy != Strategy::kGroup) return x.reshape({rows, 1, features});
  TORCH_CHECK(spec.group_size > 0 && features % spec.group_size == 0, "group_view: group_size is ", spec.group_size,
              ", expected a divisor of the last dimension, ", features);
  return x.reshape({rows, features / spec.group_size, spec.group_size});
}

QParams compute_qparams(const Tensor& x, const QuantSpec& spec, const Tensor& clip) {
  check_spec("compute_qparams", spec);
  const Tensor grouped = to_compute_type(group_view(x, spec));
  TORCH_CHECK(grouped.size(-1) > 0, "compute_qparams: tensor of size ", x.sizes(), " has empty groups");
  Tensor high = grouped.amax(-1), low = grouped.amin(-1);
  if (!spec.dynamic && !spec.symmetric) {
    high = high.clamp_min(0);
    low = low.clamp_max(0);
  }
  if (clip.defined()) {
    const auto [of_low, of_high] = ratios_of(clip, high, spec);
    if (spec.dynamic && !spec.symmetric) {
      const Tensor middle = (high + low) / 2, half = (high - low) / 2;
      high = middle + of_low * half;
      low = middle - of_low * half;
    } else {
      high = of_high * high;
      low = of_low * low;
    }
  }
  const auto steps = static_cast<double>(num_steps(spec));
  if (spec.symmetric) return {round_scale(at::maximum(high, -low) / (steps / 2), spec), {}};
  const Tensor scale = round_scale((high - low) / steps, spec);
  const Tensor zero_point = static_cast<double>(code_min(spec)) - low / scale;
  if (spec.dynamic) return {scale, zero_point};
  return {scale, round_zero_point(zero_point, spec)};
}

Tensor quantize(const Tensor& x, const QParams& qparams, const QuantSpec& spec) {
  check_spec("quantize", spec);
  const at::NoGradGuard no_grad;
  const Tensor grouped = to_compute_type(group_view(x, spec));
  check_qparams("quantize", grouped, qparams);
  Tensor codes = grouped / qparams.scale.unsqueeze(-1);
  if (qparams.zero_point.defined()) codes += qparams.zero_point.unsqueeze(-1);
  return codes.round_().clamp_(code_min(spec), code_max(spec)).to(at::kChar).view(x.sizes());
}

Tensor dequantize(const Tensor& codes, const QParams& qparams, const QuantSpec& spec) {
  check_spec("dequantize", spec);
  const Tensor grouped = group_view(codes, spec).to(qparams.scale.scalar_type());
  check_qparams("dequantize", grouped, qparams);
  return from_grid(grouped, qparams).view(codes.sizes());
}

Tensor fake_quantize(const Tensor& x, const QParams& qparams, const QuantSpec& spec) {
  check_spec("fake_quantize", spec);
  const Tensor grouped = to_compute_type(group_view(x, spec));
  check_qparams("fake_quantize", grouped, qparams);
  if (is_fusable(grouped) && is_fusable(qparams.scale) && is_fusable(qparams.zero_point)) {
    return fused_fake_quantize(grouped.contiguous(), qparams, spec).to(x.scalar_type()).view(x.sizes());
  }
  const Tensor position = to_grid(grouped, qparams);
  const Tensor codes = straight_through(position, position.detach().round()).clamp(code_min(spec), code_max(spec));
  return from_grid(codes, qparams).to(x.scalar_type()).view(x.sizes());
}

Tensor fake_quantize_from_base(const Tensor& x, const QuantSpec& spec, const Tensor& clip) {
  check_spec("fake_quantize_from_base", spec);
  TORCH_INTERNAL_ASSERT(spec.dynamic && !spec.symmetric);
  const Tensor grouped = to_compute_type(group_view(x, spec));
  const Tensor high = grouped.amax(-1), low = grouped.amin(-1);
  const Tensor middle = (high + low) / 2, half = (high - low) / 2;
  const Tensor reach = clip.defined() ? ratios_of(clip, high, spec).first * half : half, base = middle - reach;
  const auto count = static_cast<double>(num_steps(spec));
  const Tensor scale = round_scale((middle + reach - base) / count, spec).unsqueeze(-1), from = base.unsqueeze(-1);
  const Tensor position = (grouped - from) / scale;
  const Tensor codes = straight_through(position, position.detach().round()).clamp(0, count);
  return (codes * scale + from).to(x.scalar_type()).view(x.sizes());
}

Tensor QuantizedWeight::dequantized() const { return dequantize(codes, qparams, spec); }

}  // namespace baseq
