#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "balance.h"
#include "search_scale.h"
#include "smooth.h"
#include "starts.h"
#include "steps.h"
#include "transform/random_rotation.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;

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

/// Scales of channel maxima.
void append_smooth(const TransformStep& step, OpenBlock& block, const BlockTask& task) {
  const BlockMoments moments = measure_block(block.layer(), task.inputs.full_precision, task.inputs.rope,
                                             task.token_weights, {.with_maxima = true}, task.inputs.pass);
  std::map<Site, Factor> factors;  // all of them from the same layer
  for (const Site site : step.at) {
    const bool smoothed = step.kind == StepKind::kSmooth;
    factors.emplace(site,
                    smoothed ? smooth(block.layer(), site, moments, step.strength) : coarse_to_fine(site, moments));
  }
  for (auto& [site, factor] : factors) append(block, site, std::move(factor));
}

/// One site after the other, each with the scales of those before it.
void append_searched(const std::vector<Site>& at, OpenBlock& block, const BlockTask& task) {
  for (const Site site : at) append(block, site, search_scale(block, site, task).factor);
}

/// Each factor of a block draws its own numbers.
uint64_t seed_of_factor(const BlockState& state, Site site, const BlockTask& task) {
  const auto it = state.transforms.find(site);
  const size_t position = it == state.transforms.end() ? 0 : it->second.size();
  const uint64_t of_block = derived_seed(task.seed, static_cast<uint64_t>(task.place.block));
  return derived_seed(derived_seed(of_block, static_cast<uint64_t>(site)), position);
}

}  // namespace

void apply(const TransformStep& step, OpenBlock& block, const BlockTask& task) {
  const c10::NoGradGuard no_grad;
  if (step.kind == StepKind::kBalance) return append_balance(step.at, block, task);
  if (step.kind == StepKind::kSmooth || step.kind == StepKind::kCoarseToFine) return append_smooth(step, block, task);
  if (step.kind == StepKind::kSearch) return append_searched(step.at, block, task);
  std::vector<Site> at;
  std::copy_if(step.at.begin(), step.at.end(), std::back_inserter(at),
               [](Site site) { return site != Site::kResidual; });
  std::map<Site, Loudest> seen;
  if (needs_tokens(step)) seen = loudest_tokens(block.layer(), at, task.inputs.full_precision, task.inputs);
  for (const Site site : at) {
    append(block, site,
           start_factor(step, site, task.place.config, task.place.compute, seen[site],
                        seed_of_factor(block.state(), site, task)));
  }
}

Transform residual_transform(const Recipe& recipe, const ModelConfig& config, at::Device device, const Tensor& matrix) {
  Transform transform;
  for (const TransformStep* step : recipe.steps_of<TransformStep>()) {
    if (std::find(step->at.begin(), step->at.end(), Site::kResidual) == step->at.end()) continue;
    if (step->kind == TransformStep::Kind::kMatrix) {
      const at::TensorOptions options = at::TensorOptions().dtype(at::kDouble).device(device);
      transform.push_back(rotation_factor(matrix.defined() ? matrix : at::eye(config.hidden_size, options)));
      continue;
    }
    TORCH_CHECK(step->kind == TransformStep::Kind::kHadamard,
                "the residual stream takes only transforms of kind \"hadamard\" and \"matrix\"");
    transform.push_back(start_factor(*step, Site::kResidual, config, at::kDouble));
  }
  return transform;
}

}  // namespace baseq
