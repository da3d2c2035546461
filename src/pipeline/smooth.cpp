#include "smooth.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace baseq {
namespace {

/// Scales and weight magnitudes count as at least this.
constexpr double kSmallest = 1e-5;

}  // namespace

Factor smooth(const DecoderLayer& layer, Site site, const BlockMoments& moments, double strength) {
  const c10::NoGradGuard no_grad;
  const SiteInfo& info = site_info(site);
  const Tensor inputs = moments.at(site).maximum;
  TORCH_CHECK(inputs.defined(), "smooth: no maxima at ", std::string(info.name));
  Tensor weights;
  for (const std::string_view reader : info.readers) {
    Tensor largest = layer.linear(reader).weight.abs().amax(0).to(at::kDouble);
    if (site == Site::kValue) {  // the query heads of a group read the same values
      const Attention& attention = layer.self_attn;
      largest = largest.view({attention.num_kv_heads, -1, attention.head_dim}).amax(1).flatten();
    }
    weights = weights.defined() ? at::maximum(weights, largest) : largest;
  }
  const Tensor divisor = (inputs.pow(strength) / weights.clamp_min(kSmallest).pow(1 - strength)).clamp_min(kSmallest);
  const Tensor known = inputs.gt(0).logical_and(weights.gt(0)).logical_and(divisor.isfinite());
  const Tensor used = at::where(known, divisor, 1.0);
  return scale_factor(used.reciprocal(), used);
}

}  // namespace baseq
