#include "smooth.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <limits>

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

double standing_out(const Tensor& values) {
  const Tensor sorted = std::get<0>(values.detach().to(at::kCPU, at::kDouble).sort());
  const double q1 = sorted.quantile(0.25).item<double>(), q3 = sorted.quantile(0.75).item<double>();
  const Tensor high = sorted.masked_select(sorted.gt(q3 + 1.5 * (q3 - q1)));
  double least = std::numeric_limits<double>::infinity(), best = -least;
  for (int64_t i = 0; i < high.size(0); ++i) {
    const Tensor lower = at::cat({at::full({1}, q3 + 1.5 * (q3 - q1), at::kDouble), high.narrow(0, 0, i)});
    const double distance = (high.narrow(0, i, high.size(0) - i).mean() - lower.mean()).item<double>();
    const double score = distance * distance - lower.var(/*unbiased=*/false).item<double>();
    if (score <= best) continue;
    best = score;
    least = high[i].item<double>();
  }
  return least;
}

Factor coarse_to_fine(Site site, const BlockMoments& moments) {
  const c10::NoGradGuard no_grad;
  const Tensor maxima = moments.at(site).maximum;
  TORCH_CHECK(maxima.defined(), "coarse_to_fine: no maxima at ", std::string(site_info(site).name));
  const Tensor outlier = maxima.ge(standing_out(maxima));
  const Tensor normal = at::where(outlier, 0.0, maxima).amax();
  const Tensor divisor = (maxima / normal).sqrt();
  const Tensor used = at::where(outlier.logical_and(divisor.isfinite()), divisor, 1.0);
  return scale_factor(used.reciprocal(), used);
}

}  // namespace baseq
