#include "baseq/pipeline/statistics.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "../quant/product.h"

namespace baseq {
namespace {

/// Weighted sums over tokens: products in float32, sums in float64.
class MomentSums {
 public:
  explicit MomentSums(bool with_covariance = false) : with_covariance_(with_covariance) {}

  /// x: [tokens, features], weights [tokens, 1].
  void add(const Tensor& x, const Tensor& weights) {
    const Tensor weighted = x * weights;
    accumulate(first_, weighted.sum(0, /*keepdim=*/false, at::kDouble));
    accumulate(second_, with_covariance_ ? matrix_product(weighted.t(), x).to(at::kDouble)
                                         : (weighted * x).sum(0, /*keepdim=*/false, at::kDouble));
  }

  /// Everything undefined when nothing was added.
  Moments over(double total) const {
    Moments moments;
    if (!first_.defined()) return moments;
    moments.mean = first_ / total;
    if (with_covariance_) {
      moments.covariance = second_ / total - at::outer(moments.mean, moments.mean);
      moments.variance = moments.covariance.diagonal();
    } else {
      moments.variance = second_ / total - moments.mean.square();
    }
    // Rounding can leave a constant channel slightly below zero.
    moments.variance = moments.variance.clamp_min(0);
    return moments;
  }

 private:
  static void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum.add_(term) : term; }

  bool with_covariance_;
  Tensor first_, second_;
};

}  // namespace

Tensor token_weights(const Tensor& target, Recipe::Loss loss, const at::TensorOptions& compute) {
  const auto shape = target.sizes().slice(0, 2);
  if (loss == Recipe::Loss::kMse) return at::ones(shape, compute);
  std::vector<Tensor> weights;
  for_each_batch(target, compute, [&](int64_t, const Tensor& windows) {
    weights.push_back(1.0 / windows.square().mean(-1).clamp_min(1e-12));
  });
  const Tensor all = at::cat(weights);
  return all / all.mean();
}

BlockMoments measure_block(const DecoderLayer& layer, const Tensor& stream, const RotaryEmbedding& rope,
                           const Tensor& weights, bool with_o_covariance, InputPoint last, const PassOptions& options) {
  const c10::NoGradGuard no_grad;
  DecoderLayer probe = without_quant_points(layer);
  MomentSums qkv, o(with_o_covariance), gate_up, down, key, value, query;
  Tensor weight;  // of the tokens of the current batch, [tokens, 1]
  const auto watch = [&](QuantPoint& point, MomentSums& sums) {
    point.observer = [&](const Tensor& x) { sums.add(x.reshape({-1, x.size(-1)}), weight); };
  };
  watch(probe.self_attn.o_input, o);
  watch(probe.mlp.input, gate_up);
  watch(probe.mlp.down_input, down);
  watch(probe.self_attn.k_cache, key);
  watch(probe.self_attn.v_cache, value);
  probe.self_attn.input.observer = [&](const Tensor& x) {
    qkv.add(x.flatten(0, 1), weight);
    query.add(probe.self_attn.query(x).flatten(0, 1).flatten(1), weight);
  };
  const auto pass = [&](int64_t begin, const Tensor& windows) {
    weight = weights.narrow(0, begin, windows.size(0)).reshape({-1, 1});
    probe.input_of(last, windows, rope);
  };
  for_each_batch(stream, rope.cos.options(), pass, options);
  const double total = weights.sum(at::kDouble).item<double>();
  return {.qkv = qkv.over(total),
          .o = o.over(total),
          .gate_up = gate_up.over(total),
          .down = down.over(total),
          .key = key.over(total),
          .value = value.over(total),
          .query = query.over(total)};
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
