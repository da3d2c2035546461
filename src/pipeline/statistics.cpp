#include "pipeline/statistics.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "../quant/finite.h"
#include "../quant/product.h"

namespace baseq {
namespace {

/// Weighted sums over tokens: products in float32, sums in float64.
class MomentSums {
 public:
  explicit MomentSums(bool with_covariance = false, bool with_maximum = false)
      : with_covariance_(with_covariance), with_maximum_(with_maximum) {}

  /// x: [tokens, features], weights [tokens, 1].
  void add(Tensor x, Tensor weights) {
    if (const Tensor dropped = drop_tokens_not_finite({&x}, weights); dropped.defined()) accumulate(dropped_, dropped);
    const Tensor weighted = x * weights;
    accumulate(first_, weighted.sum(0, /*keepdim=*/false, at::kDouble));
    accumulate(second_, with_covariance_ ? matrix_product(weighted.t(), x).to(at::kDouble)
                                         : (weighted * x).sum(0, /*keepdim=*/false, at::kDouble));
    if (!with_maximum_) return;
    const Tensor maximum = x.abs().amax(0).to(at::kDouble);
    maximum_ = maximum_.defined() ? at::maximum(maximum_, maximum) : maximum;
  }

  /// Everything undefined when nothing was added, zero when no token counted.
  Moments over(double weight_of_all) const {
    Moments moments;
    if (!first_.defined()) return moments;
    const double counted = weight_of_all - (dropped_.defined() ? dropped_.item<double>() : 0);
    const double total = counted > 0 ? counted : 1;
    moments.mean = first_ / total;
    if (with_covariance_) {
      moments.covariance = second_ / total - at::outer(moments.mean, moments.mean);
      moments.variance = moments.covariance.diagonal();
    } else {
      moments.variance = second_ / total - moments.mean.square();
    }
    // Rounding can leave a constant channel slightly below zero.
    moments.variance = moments.variance.clamp_min(0);
    moments.maximum = maximum_;
    return moments;
  }

 private:
  static void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum.add_(term) : term; }

  bool with_covariance_, with_maximum_;
  Tensor dropped_;  ///< weight of the tokens that were left out
  Tensor first_, second_, maximum_;
};

}  // namespace

Tensor token_weights(const Tensor& target, Recipe::TokenWeights kind, const at::TensorOptions& compute) {
  std::vector<Tensor> energies;
  for_each_batch(target, compute,
                 [&](int64_t, const Tensor& windows) { energies.push_back(windows.square().mean(-1)); });
  const Tensor energy = at::cat(energies), counted = energy.isfinite();
  const Tensor weights = kind == Recipe::TokenWeights::kUniform ? at::ones_like(energy) : 1.0 / energy.clamp_min(1e-12);
  if (!counted.all().item<bool>()) {
    return at::where(counted, weights / weights.masked_select(counted).mean(), 0.0);
  }
  return kind == Recipe::TokenWeights::kUniform ? weights : weights / weights.mean();
}

Tensor drop_tokens_not_finite(std::initializer_list<Tensor*> inputs, Tensor& weights) {
  const auto finite = [](const Tensor* x) { return !x->defined() || all_finite(*x); };
  if (weights.is_cpu() && std::all_of(inputs.begin(), inputs.end(), finite)) return {};
  Tensor counted = at::ones_like(weights, at::kBool);
  for (const Tensor* x : inputs) {
    if (x->defined()) counted = counted.logical_and_(x->isfinite().all(-1, /*keepdim=*/true));
  }
  for (Tensor* x : inputs) {
    if (x->defined()) *x = at::where(counted, *x, 0.0);
  }
  const Tensor before = weights;
  weights = at::where(counted, weights, 0.0);
  return (before - weights).sum(at::kDouble);
}

BlockMoments measure_block(const DecoderLayer& layer, const Tensor& stream, const RotaryEmbedding& rope,
                           const Tensor& weights, const MeasureOptions& measure, const PassOptions& options) {
  const c10::NoGradGuard no_grad;
  DecoderLayer probe = without_quant_points(layer);
  std::map<Site, MomentSums> sums;
  MomentSums query;
  Tensor weight;  // of the tokens of the current batch, [tokens, 1]
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const bool covariance = measure.with_o_covariance && info.site == Site::kO;
    MomentSums& sum = sums.emplace(info.site, MomentSums(covariance, measure.with_maxima)).first->second;
    probe.point(info.site).observer = [&, site = info.site](const Tensor& x) {
      sum.add(x.reshape({-1, x.size(-1)}), weight);
      if (site == Site::kQkv) query.add(probe.self_attn.query(x).flatten(0, 1).flatten(1), weight);
    };
  }
  const auto pass = [&](int64_t begin, const Tensor& windows) {
    weight = weights.narrow(0, begin, windows.size(0)).reshape({-1, 1});
    probe.input_of(measure.last, windows, rope);
  };
  for_each_batch(stream, rope.cos.options(), pass, options);
  const double total = weights.sum(at::kDouble).item<double>();
  BlockMoments moments{.query = query.over(total)};
  for (const auto& [site, sum] : sums) moments.sites[site] = sum.over(total);
  return moments;
}

DecoderLayer without_quant_points(DecoderLayer layer) {
  layer.for_each_quant_point([](const std::string&, QuantPoint& point) {
    const Tensor gain = point.gain;
    point = QuantPoint{};
    point.gain = gain;
  });
  return layer;
}

}  // namespace baseq
