#include <algorithm>

#include "baseq/export/export_checkpoint.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {
namespace {

/// Whether a learn step moves a parameter of that kind, such as "clip" of the rate "*.clip".
bool learns(const Recipe& recipe, const std::string& what) {
  return std::ranges::any_of(recipe.steps_of<LearnStep>(), [&](const LearnStep* step) {
    return std::ranges::any_of(step->rates, [&](const auto& rate) { return rate.first.ends_with("." + what); });
  });
}

/// Whether the points have neither clips, shifts nor gains.
bool has_plain_points(const Recipe& recipe) {
  const bool plain = std::ranges::all_of(recipe.steps_of<PointsStep>(), [](const PointsStep* step) {
    return step->clip == 1 && step->shift == PointsStep::Shift::kNone;
  });
  return plain && !learns(recipe, "clip") && !learns(recipe, "shift") && !learns(recipe, "gain");
}

/// Whether inputs of linears pass a transform that no other weight absorbs.
bool transforms_online(const Recipe& recipe) {
  return std::ranges::any_of(recipe.transforms(), [](const TransformStep& step) {
    using Kind = TransformStep::Kind;
    const bool scale = step.kind == Kind::kScale || step.kind == Kind::kBalance || step.kind == Kind::kSmooth;
    return !scale && std::ranges::any_of(step.at, [](Site site) { return site_info(site).is_input(); });
  });
}

}  // namespace

std::vector<std::string> export_formats(const Recipe& recipe) {
  const auto& weights = recipe.grids.weights;
  const auto& activations = recipe.grids.input_activations;
  const auto& cache = recipe.grids.kv_cache;
  const RoundStep* round = recipe.round_step();
  const bool low_rank = round != nullptr && round->low_rank;
  const bool weights_alone = !activations && !cache;
  const bool codes_alone = weights && weights_alone && !low_rank && !transforms_online(recipe);
  std::vector<std::string> formats;
  if (weights_alone) formats.emplace_back("hf");
  if (weights && !cache && !low_rank && (!activations || (activations->symmetric && has_plain_points(recipe))) &&
      (weights->symmetric || weights->num_bits == 4 || weights->num_bits == 8) &&
      weights->scale_dtype == at::kBFloat16) {
    formats.emplace_back("compressed-tensors");
  }
  if (codes_alone && weights->scale_dtype == at::kHalf) {
    if (weights->num_bits <= 4 || weights->num_bits == 8) formats.emplace_back("gptq");
    if (weights->num_bits == 4) formats.emplace_back("awq");
    constexpr int64_t kBlock = 32;
    const bool blocks = weights->strategy != Strategy::kGroup || weights->group_size % kBlock == 0;
    if (weights->num_bits <= 4 && weights->symmetric && blocks) formats.emplace_back("gguf");
  }
  if (weights_alone && low_rank) formats.emplace_back("peft");
  return formats;
}

}  // namespace baseq
