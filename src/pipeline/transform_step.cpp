#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>

#include "balance.h"
#include "search_scale.h"
#include "smooth.h"
#include "steps.h"

namespace baseq {
namespace {

/// A Hadamard matrix over the site; at value and query_key one per head, which at query_key all heads share.
Factor hadamard_at(Site site, const ModelConfig& config) {
  const SiteShape shape = site_shape(site, config);
  return hadamard_factor(shape.width(), site == Site::kQueryKey ? 1 : shape.blocks);
}

Factor identity_matrices(Site site, const BlockPlace& place) {
  const SiteShape shape = site_shape(site, place.config);
  const int64_t size = shape.width();
  return rotation_factor(at::eye(size, place.compute).expand({shape.blocks, size, size}));
}

void append(OpenBlock& block, Site site, Factor factor) {
  block.edit([&](BlockState& state) { state.transforms[site].push_back(std::move(factor)); });
}

void append_balance(const std::vector<Site>& at, OpenBlock& block, const BlockTask& task) {
  Balanced balanced = balance(block.layer(), at, task.inputs, task.token_weights);
  for (const Site site : balanced.left_out) {
    task.tell(Warning{
        fmt::format("block {}: the transform \"balance\" at {} is left out: the calibration windows show values there "
                    "that are not finite",
                    task.place.block, site_info(site).name)});
  }
  for (auto& [site, factor] : balanced.factors) append(block, site, std::move(factor));
}

void append_smooth(const TransformStep& step, OpenBlock& block, const BlockTask& task) {
  const BlockMoments moments = measure_block(block.layer(), task.inputs.full_precision, task.inputs.rope,
                                             task.token_weights, {.with_maxima = true}, task.inputs.pass);
  std::map<Site, Factor> factors;  // all of them from the same layer
  for (const Site site : step.at) factors.emplace(site, smooth(block.layer(), site, moments, step.strength));
  for (auto& [site, factor] : factors) append(block, site, std::move(factor));
}

/// One site after the other, each with the scales of those before it.
void append_searched(const std::vector<Site>& at, OpenBlock& block, const BlockTask& task) {
  for (const Site site : at) append(block, site, search_scale(block, site, task).factor);
}

}  // namespace

void apply(const TransformStep& step, OpenBlock& block, const BlockTask& task) {
  const c10::NoGradGuard no_grad;
  using Kind = TransformStep::Kind;
  if (step.kind == Kind::kBalance) return append_balance(step.at, block, task);
  if (step.kind == Kind::kSmooth) return append_smooth(step, block, task);
  if (step.kind == Kind::kSearch) return append_searched(step.at, block, task);
  for (const Site site : step.at) {
    if (site == Site::kResidual) continue;
    if (step.kind == Kind::kHadamard) {
      append(block, site, hadamard_at(site, task.place.config));
    } else if (step.kind == Kind::kScale) {
      const int64_t features = site_shape(site, task.place.config).features;
      append(block, site, scale_factor(at::ones({features}, task.place.compute)));
    } else {
      append(block, site, identity_matrices(site, task.place));
    }
  }
}

Transform residual_transform(const Recipe& recipe, const ModelConfig& config) {
  Transform transform;
  for (const TransformStep* step : recipe.steps_of<TransformStep>()) {
    if (std::find(step->at.begin(), step->at.end(), Site::kResidual) == step->at.end()) continue;
    TORCH_CHECK(step->kind == TransformStep::Kind::kHadamard,
                "the residual stream takes only a transform of kind \"hadamard\"");
    transform.push_back(hadamard_at(Site::kResidual, config));
  }
  return transform;
}

}  // namespace baseq
