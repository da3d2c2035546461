#include "baseq/pipeline/statistics.h"

#include <ATen/ATen.h>

namespace baseq {

Tensor token_weights(const Tensor& target, Recipe::Loss loss) {
  const auto shape = target.sizes().slice(0, 2);
  if (loss == Recipe::Loss::kMse) return at::ones(shape, target.options());
  const Tensor weights = 1.0 / target.square().mean(-1).clamp_min(1e-12);
  return weights / weights.mean();
}

Moments measure_moments(const Tensor& stream, const Tensor& weights, bool with_covariance,
                        const std::function<Tensor(const Tensor&)>& fn) {
  Tensor sum, squares;
  for_each_batch(stream, [&](int64_t begin, const Tensor& windows) {
    const Tensor x = fn(windows).flatten(0, 1);
    const Tensor weight = weights.narrow(0, begin, windows.size(0)).reshape({-1, 1});
    const Tensor weighted = x * weight;
    const Tensor first = weighted.sum(0, /*keepdim=*/false, at::kDouble);
    const Tensor second = with_covariance ? at::matmul(weighted.t(), x).to(at::kDouble)
                                          : (weighted * x).sum(0, /*keepdim=*/false, at::kDouble);
    sum = sum.defined() ? sum.add_(first) : first;
    squares = squares.defined() ? squares.add_(second) : second;
  });
  const double total = weights.sum(at::kDouble).item<double>();
  Moments moments;
  moments.mean = sum / total;
  if (with_covariance) {
    moments.covariance = squares / total - at::outer(moments.mean, moments.mean);
    moments.variance = moments.covariance.diagonal();
  } else {
    moments.variance = squares / total - moments.mean.square();
  }
  // Rounding can leave a constant channel slightly below zero.
  moments.variance = moments.variance.clamp_min(0);
  return moments;
}

Tensor cache_input(const DecoderLayer& layer, bool key, const Tensor& windows, const RotaryEmbedding& rope) {
  DecoderLayer probe = layer;
  Tensor seen;
  (key ? probe.self_attn.k_cache : probe.self_attn.v_cache).observer = [&](const Tensor& x) { seen = x; };
  probe.input_of(InputPoint::kO, windows, rope);
  return seen;
}

DecoderLayer without_quant_points(DecoderLayer layer) {
  layer.for_each_quant_point([](const std::string&, QuantPoint& point) { point = QuantPoint{}; });
  return layer;
}

}  // namespace baseq
