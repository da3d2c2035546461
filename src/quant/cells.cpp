#include "cells.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <limits>

#include "grid.h"

namespace baseq {
namespace {

/// A rounding whose gradient is the identity.
Tensor pass_gradient(const Tensor& x, const Tensor& rounded) { return x + (rounded - x).detach(); }

/// Half a step less what float32 needs to stay on this side of the border.
constexpr double kInsideCell = 0.499;

}  // namespace

Tensor round_scale(const Tensor& scale, const QuantSpec& spec) {
  const Tensor clamped = scale.clamp_min(smallest_scale(spec));
  if (spec.scale_dtype == at::kFloat) return clamped;
  return pass_gradient(clamped, clamped.detach().to(spec.scale_dtype).to(clamped.scalar_type()));
}

Tensor round_zero_point(const Tensor& zero_point, const QuantSpec& spec) {
  return pass_gradient(zero_point, zero_point.detach().round()).clamp(code_min(spec), code_max(spec));
}

Tensor in_units_of(const Tensor& steps, const Tensor& scale, const QuantSpec& spec) {
  return (group_view(steps, spec) * scale.unsqueeze(-1)).view(steps.sizes());
}

Tensor nearest_in_cells(const Tensor& weight, const QuantizedWeight& rounded) {
  const at::NoGradGuard no_grad;
  const QuantSpec& spec = rounded.spec;
  const Tensor x = group_view(weight, spec), codes = group_view(rounded.codes, spec).to(x.scalar_type());
  const Tensor scale = rounded.qparams.scale.to(x.scalar_type()).unsqueeze(-1);
  const Tensor zero_point = rounded.qparams.zero_point;
  const Tensor center = zero_point.defined() ? codes - zero_point.unsqueeze(-1) : codes;
  // The first and the last cell have no end.
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor low = ((center - kInsideCell) * scale).masked_fill(codes.eq(code_min(spec)), -infinity);
  const Tensor high = ((center + kInsideCell) * scale).masked_fill(codes.eq(code_max(spec)), infinity);
  const Tensor inside = at::minimum(at::maximum(x, low), high).view(weight.sizes());
  const Tensor same = quantize(weight, rounded.qparams, spec).eq(rounded.codes);
  return at::where(same, weight, inside);
}

}  // namespace baseq
