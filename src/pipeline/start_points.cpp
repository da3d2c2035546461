#include "baseq/pipeline/start_points.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "baseq/pipeline/statistics.h"

namespace baseq {
namespace {

/// How one point starts.
struct Start {
  const SiteInfo* info;
  const Recipe::Activations* activations;
  Recipe::Shift shift;
  Site reached_at;  ///< a pass that ends here has come by
};

std::vector<Start> starts_of(const Recipe& recipe, std::initializer_list<Site> only) {
  std::vector<Start> starts;
  for (const SiteInfo& info : sites()) {
    if (only.size() > 0 && std::find(only.begin(), only.end(), info.site) == only.end()) continue;
    if (info.is_input() && recipe.input_activations) {
      const Recipe::InputActivations& activations = *recipe.input_activations;
      const Recipe::Shift shift = info.norm.empty() ? activations.shift : activations.norm_shift;
      starts.push_back({&info, &activations, shift, info.site});
    } else if (info.cache && recipe.kv_cache) {
      starts.push_back({&info, &*recipe.kv_cache, recipe.kv_cache->shift, Site::kO});
    }
  }
  return starts;
}

}  // namespace

void start_quant_points(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights,
                        std::initializer_list<Site> only) {
  const c10::NoGradGuard no_grad;
  const std::vector<Start> starts = starts_of(recipe, only);
  std::optional<Site> last;  // a pass through the block need not go further than the last mean
  for (const Start& start : starts) {
    if (start.shift == Recipe::Shift::kMean) last = std::max(last.value_or(start.reached_at), start.reached_at);
  }
  BlockMoments moments;
  if (last) {
    const bool quantized = recipe.stream == Recipe::Stream::kQuantized;
    moments = measure_block(layer, quantized ? inputs.quantized : inputs.full_precision, inputs.rope, weights,
                            /*with_o_covariance=*/false, *last, inputs.pass);
  }
  const auto options = layer.self_attn.o_proj.weight.options();
  for (const Start& start : starts) {
    const Site site = start.info->site;
    const auto [groups, features] = layer.shape(site);
    QuantPoint& point = layer.point(site);
    point.enabled = true;
    point.spec = start.activations->spec;
    point.clip = at::full({groups, 1}, start.activations->clip, options);
    if (start.shift == Recipe::Shift::kZero) point.shift = at::zeros({features}, options);
    if (start.shift == Recipe::Shift::kMean) point.shift = moments.at(site).mean.to(options);
    // Softmax does not see a constant added to every key's logit of a query.
    if (site == Site::kQueryKey) point.add_shift_back = false;
  }
}

}  // namespace baseq
