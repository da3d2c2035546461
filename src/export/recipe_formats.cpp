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
    const bool scale = step.kind == Kind::kScale || step.kind == Kind::kBalance || step.kind == Kind::kSmooth ||
                       step.kind == Kind::kCoarseToFine;
    return !scale && std::ranges::any_of(step.at, [](Site site) { return site_info(site).is_input(); });
  });
}

}  // namespace

std::vector<std::string> export_formats(const Recipe& recipe) {
  const auto& activations = recipe.grids.input_activations;
  const auto& cache = recipe.grids.kv_cache;
  std::vector<QuantSpec> grids;
  if (recipe.grids.weights) grids.push_back(*recipe.grids.weights);
  bool leaves_out = false;
  for (const GridOverride& item : recipe.grids.overrides) {
    leaves_out = leaves_out || !item.weights;
    if (item.weights) grids.push_back(*item.weights);
  }
  const bool alike = !leaves_out && std::ranges::all_of(grids, [&](const auto& grid) { return grid == grids[0]; });
  const auto all = [&](auto&& is_so) { return !grids.empty() && std::ranges::all_of(grids, is_so); };
  const auto any = [&](auto&& is_so) { return std::ranges::any_of(grids, is_so); };
  const auto scales = [&](at::ScalarType dtype) {
    return all([&](const QuantSpec& grid) { return grid.scale_dtype == dtype; });
  };
  const RoundStep* round = recipe.round_step();
  const bool low_rank = round != nullptr && round->low_rank;
  const bool weights_alone = !activations && !cache;
  const bool codes_alone = weights_alone && !low_rank && !transforms_online(recipe);
  const auto is_packed = [](const QuantSpec& grid) {
    return grid.symmetric || grid.num_bits == 4 || grid.num_bits == 8;
  };
  // Q4_0, and Q8_0 for what has more bits.
  const auto has_blocks = [](const QuantSpec& grid) {
    constexpr int64_t kBlock = 32;
    return grid.strategy != Strategy::kGroup || grid.group_size % kBlock == 0;
  };
  std::vector<std::string> formats;
  if (weights_alone) formats.emplace_back("hf");
  if (!cache && !low_rank && !(activations && leaves_out) &&
      (!activations || (activations->symmetric && has_plain_points(recipe))) && all(is_packed) &&
      scales(at::kBFloat16)) {
    formats.emplace_back("compressed-tensors");
  }
  if (codes_alone && alike && scales(at::kHalf)) {
    if (grids[0].num_bits <= 4 || grids[0].num_bits == 8) formats.emplace_back("gptq");
    if (grids[0].num_bits == 4) formats.emplace_back("awq");
  }
  if (codes_alone && scales(at::kHalf) && all(has_blocks) &&
      any([](const QuantSpec& grid) { return grid.num_bits <= 4 && grid.symmetric; }) &&
      all([](const QuantSpec& grid) { return grid.num_bits <= 4 || grid.symmetric; })) {
    formats.emplace_back("gguf");
  }
  if (weights_alone && low_rank && !leaves_out) formats.emplace_back("peft");
  return formats;
}

}  // namespace baseq
