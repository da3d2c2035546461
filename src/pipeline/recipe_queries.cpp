#include <algorithm>

#include "baseq/pipeline/recipe.h"

namespace baseq {

std::string Recipe::step_path(size_t pass, size_t step) const {
  const std::string in_pass = "steps[" + std::to_string(step) + "]";
  return passes.size() == 1 ? in_pass : "passes[" + std::to_string(pass) + "]." + in_pass;
}

const RoundStep* Recipe::round_step() const {
  const std::vector<const RoundStep*> steps = steps_of<RoundStep>();
  return steps.empty() ? nullptr : steps.back();
}

bool Recipe::has_transform(Site site) const {
  return std::ranges::any_of(steps_of<TransformStep>(), [&](const TransformStep* step) {
    return std::ranges::find(step->at, site) != step->at.end();
  });
}

bool Recipe::has_mean_shift() const {
  return std::ranges::any_of(steps_of<PointsStep>(),
                             [](const PointsStep* step) { return step->shift == PointsStep::Shift::kMean; });
}

bool Recipe::learns() const {
  return std::ranges::any_of(steps_of<LearnStep>(), [](const LearnStep* step) { return step->epochs > 0; });
}

bool Recipe::rounding_needs_moments() const {
  return std::ranges::any_of(steps_of<RoundStep>(), [](const RoundStep* step) { return needs_moments(*step); });
}

bool Recipe::needs_calibration() const {
  const bool measures = std::ranges::any_of(steps_of<TransformStep>(), [](const TransformStep* step) {
    return step->kind == TransformStep::Kind::kBalance || step->kind == TransformStep::Kind::kSmooth;
  });
  return measures || rounding_needs_moments() || has_mean_shift() || learns();
}

QuantizationConfig Recipe::quantization_config() const {
  const RoundStep* round = round_step();
  QuantizationConfig config{.weights = grids.weights,
                            .lora_rank = round && round->low_rank ? round->low_rank->rank : 0,
                            .input_activations = grids.input_activations,
                            .kv_cache = grids.kv_cache};
  return config;
}

std::string point_name(Site site) {
  switch (site) {
    case Site::kQueryKey:
      return "k_cache";
    case Site::kValue:
      return "v_cache";
    default:
      return std::string(site_info(site).name);
  }
}

bool needs_moments(const RoundStep& step) {
  return step.method == RoundStep::Method::kGptq ||
         (step.low_rank && step.low_rank->method != LowRankOptions::Method::kSvd);
}

}  // namespace baseq
