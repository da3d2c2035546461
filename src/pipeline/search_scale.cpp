#include "search_scale.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "baseq/quant/gptq.h"
#include "block_walk.h"
#include "statistics.h"

namespace baseq {
namespace {

/// Powers that are tried.
constexpr int64_t kRatios = 20;
/// The smallest scale before they are balanced, as in AWQ.
constexpr double kSmallestScale = 1e-4;

/// Some windows at the two places of a block whose error is measured.
class Measured {
 public:
  Measured(Site site, const DecoderLayer& layer, const BlockTask& task)
      : inputs_(task.inputs), of_attention_(site_info(site).attention) {
    const Shards& shards = inputs_.pass.shards;
    x_ = first_windows(inputs_.full_precision, shards).to(inputs_.compute());
    weights_ = first_windows(task.token_weights, shards).unsqueeze(-1);
    if (!of_attention_) middle_ = after_attention(layer, x_, inputs_.rope);
    target_ = output(layer);
    seen_ = layer.input_of(site == Site::kValue ? Site::kO : site, x_, inputs_.rope);
  }

  /// E|x_j| of what the readers see.
  Tensor magnitudes() const {
    const Tensor weighted = (seen_.abs() * weights_).nan_to_num(0.0, 0.0, 0.0);
    return weighted.flatten(0, 1).mean(0, /*keepdim=*/false, at::kDouble);
  }
  double loss(const DecoderLayer& layer) const {
    const Tensor error = (output(layer) - target_).square() * weights_;
    return error.nan_to_num(0.0, 0.0, 0.0).sum(at::kDouble).item<double>();
  }

 private:
  Tensor output(const DecoderLayer& layer) const {
    if (of_attention_) return after_attention(layer, x_, inputs_.rope);
    const Tensor result = at::empty_like(middle_);
    advance_mlp(layer, middle_, result, inputs_.rope, inputs_.pass);
    return result;
  }

  const BlockInputs& inputs_;
  bool of_attention_;
  Tensor x_, weights_, middle_, target_, seen_;
};

/// Of what o_proj reads to the features of the site value, which the query heads of a group share.
Tensor by_feature(Site site, const Tensor& magnitudes, const ModelConfig& config) {
  if (site != Site::kValue) return magnitudes;
  return magnitudes.view({config.num_key_value_heads, -1, config.head_dim}).mean(1).flatten();
}

Factor power_of(const Tensor& magnitudes, double ratio, const at::TensorOptions& options) {
  Tensor divisor = magnitudes.pow(ratio).clamp_min(kSmallestScale);
  divisor = (divisor / (divisor.max() * divisor.min()).sqrt()).to(options);
  return scale_factor(divisor.reciprocal(), divisor);
}

}  // namespace

SearchedScale search_scale(OpenBlock& block, Site site, const BlockTask& task) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(task.grids.weights, "search_scale: there is no weight grid");
  const DecoderLayer exact = without_quant_points(block.layer());
  const Measured measured(site, exact, task);
  const Tensor magnitudes = by_feature(site, measured.magnitudes(), task.place.config);
  SearchedScale best;
  for (int64_t step = 0; step < kRatios; ++step) {
    task.inputs.pass.step();
    const double ratio = static_cast<double>(step) / kRatios;
    const Factor factor = power_of(magnitudes, ratio, task.place.compute);
    BlockState state = block.state();
    state.transforms[site].push_back(factor);
    DecoderLayer layer = without_quant_points(realize(block.original(), state, task.place));
    for (const std::string_view reader : site_info(site).readers) {
      const auto& grid = task.grids.weights_of(std::string(reader));
      if (!grid) continue;
      Tensor& weight = layer.linear(reader).weight;
      weight = round_to_nearest(weight, *grid).dequantized().to(weight.options());
    }
    const double loss = measured.loss(layer);
    if (step == 0) best = {.factor = factor, .loss = loss, .loss_before = loss};
    if (loss < best.loss) best = {factor, ratio, loss, best.loss_before};
  }
  return best;
}

}  // namespace baseq
