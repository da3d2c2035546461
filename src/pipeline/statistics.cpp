#include "pipeline/statistics.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "../quant/finite.h"
#include "../quant/matmul_precision.h"
#include "../quant/product.h"

namespace baseq {
namespace {

/// Weighted sums over tokens: products in float32, sums in float64.
class MomentSums {
 public:
  explicit MomentSums(const Shards& shards, bool with_covariance = false, bool with_maximum = false)
      : with_covariance_(with_covariance),
        with_maximum_(with_maximum),
        dropped_(shards),
        first_(shards),
        second_(shards),
        maximum_(shards, TreeSum::take_larger) {}

  /// x: [tokens, features], weights [tokens, 1].
  /// @param window the first one of this process that they are of
  void add(int64_t window, Tensor x, Tensor weights) {
    if (const Tensor dropped = drop_tokens_not_finite({&x}, weights); dropped.defined()) dropped_.add(window, dropped);
    // A covariance is a small difference of what is summed here.
    const MatmulPrecisionScope exact(MatmulPrecision::kHighest, x.device());
    const Tensor weighted = x * weights;
    first_.add(window, weighted.sum(0, /*keepdim=*/false, at::kDouble));
    second_.add(window, with_covariance_ ? matrix_product(weighted.t(), x)
                                         : (weighted * x).sum(0, /*keepdim=*/false, at::kDouble));
    if (with_maximum_) maximum_.add(window, x.abs().amax(0));
  }

  /// Everything undefined when nothing was added, zero when no token counted. To be called once, by all processes.
  Moments over(double weight_of_all) {
    Moments moments;
    const Tensor dropped = dropped_.total(), first = first_.total(), second = second_.total();
    moments.maximum = maximum_.total();
    if (!first.defined()) return moments;
    const double counted = weight_of_all - (dropped.defined() ? dropped.item<double>() : 0);
    const double total = counted > 0 ? counted : 1;
    moments.mean = first / total;
    if (with_covariance_) {
      moments.covariance = second / total - at::outer(moments.mean, moments.mean);
      moments.variance = moments.covariance.diagonal();
    } else {
      moments.variance = second / total - moments.mean.square();
    }
    // Rounding can leave a constant channel slightly below zero.
    moments.variance = moments.variance.clamp_min(0);
    return moments;
  }

 private:
  bool with_covariance_, with_maximum_;
  WindowSum dropped_;  ///< weight of the tokens that were left out
  WindowSum first_, second_, maximum_;
};

}  // namespace

Tensor token_weights(const Tensor& target, Recipe::TokenWeights kind, const at::TensorOptions& compute,
                     const Shards& shards) {
  std::vector<Tensor> energies;
  for_each_batch(target, compute,
                 [&](int64_t, const Tensor& windows) { energies.push_back(windows.square().mean(-1)); });
  const Tensor energy = shards.all(at::cat(energies)), counted = energy.isfinite();
  const Tensor weights = kind == Recipe::TokenWeights::kUniform ? at::ones_like(energy) : 1.0 / energy.clamp_min(1e-12);
  if (!counted.all().item<bool>()) {
    return at::where(counted, weights / weights.masked_select(counted).mean(), 0.0);
  }
  return kind == Recipe::TokenWeights::kUniform ? weights : weights / weights.mean();
}

double weight_of_all(const Tensor& weights, const Shards& shards) {
  WindowSum sum(shards);
  for (int64_t begin = 0, end = 0; begin < weights.size(0); begin = end) {
    end = std::min(weights.size(0), shards.end_of_shard(begin));
    sum.add(begin, weights.narrow(0, begin, end - begin).sum(at::kDouble));
  }
  return sum.total().item<double>();
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
  const Shards& shards = options.shards;
  std::map<Site, MomentSums> sums;
  MomentSums query(shards);
  int64_t window = 0;  // the first one of the current batch
  Tensor weight;       // of its tokens, [tokens, 1]
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const bool covariance = measure.with_o_covariance && info.site == Site::kO;
    MomentSums& sum = sums.emplace(info.site, MomentSums(shards, covariance, measure.with_maxima)).first->second;
    probe.point(info.site).observer = [&, site = info.site](const Tensor& x) {
      sum.add(window, x.reshape({-1, x.size(-1)}), weight);
      if (site == Site::kQkv) query.add(window, probe.self_attn.query(x).flatten(0, 1).flatten(1), weight);
    };
  }
  const auto pass = [&](int64_t begin, const Tensor& windows) {
    window = begin;
    weight = weights.narrow(0, begin, windows.size(0)).reshape({-1, 1});
    probe.input_of(measure.last, windows, rope);
  };
  for_each_batch(stream, rope.cos.options(), pass, options);
  const double total = weight_of_all(weights, shards);
  BlockMoments moments{.query = query.over(total)};
  for (auto& [site, sum] : sums) moments.sites[site] = sum.over(total);
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
