#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "baseq/pipeline/recipe.h"
#include "starts.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;

/// A step in one or two words; empty for one that only turns points on.
std::string describe_step(const nlohmann::json& step) {
  const std::string type = step["step"].get<std::string>();
  if (type == "transform") return step["kind"].get<std::string>();
  if (type == "points") return step["shift"] == "mean" ? "means" : "";
  if (type == "learn" && step["epochs"] == 0 && step["steps"] == 0) return "";
  if (type == "learn") return step["loss"] == "mse" ? "learn" : step["loss"].get<std::string>();
  if (type == "choose") return "choose by " + step["by"].get<std::string>();
  std::string rounding = step["compensate_streams"] == true ? "gptaq" : step["method"].get<std::string>();
  if (const auto& low_rank = step["low_rank"]; low_rank.is_object()) {
    rounding += fmt::format(" + {} rank {}", low_rank["method"].get<std::string>(), low_rank["rank"].get<int64_t>());
  }
  return rounding;
}

}  // namespace

std::string describe_method(const Recipe& recipe) {
  std::vector<std::string> words;
  const nlohmann::json json = recipe.to_json();
  const nlohmann::json passes = json.contains("passes") ? json.at("passes") : nlohmann::json::array({json});
  for (const nlohmann::json& pass : passes) {
    for (const nlohmann::json& step : pass["steps"]) {
      const std::string word = describe_step(step);
      // A transform at several places is one idea.
      const bool repeated = step["step"] == "transform" && std::ranges::find(words, word) != words.end();
      if (!word.empty() && !repeated && (words.empty() || words.back() != word)) words.push_back(word);
    }
  }
  return fmt::format("{}", fmt::join(words, ", "));
}

std::string Recipe::step_path(size_t pass, size_t step) const {
  const std::string in_pass = "steps[" + std::to_string(step) + "]";
  const Pass& first = passes.front();
  const bool listed = passes.size() > 1 || first.over == Pass::Over::kModel || first.in_windows();
  return !listed ? in_pass : "passes[" + std::to_string(pass) + "]." + in_pass;
}

const RoundStep* Recipe::round_step() const {
  const std::vector<const RoundStep*> steps = steps_of<RoundStep>();
  return steps.empty() ? nullptr : steps.back();
}

std::vector<TransformStep> Recipe::transforms() const {
  std::vector<TransformStep> found;
  for (const TransformStep* step : steps_of<TransformStep>()) found.push_back(*step);
  for (const ChooseStep* choice : steps_of<ChooseStep>()) {
    for (const std::vector<TransformStep>& chain : choice->from) {
      for (TransformStep step : chain) {
        step.at = choice->at;
        found.push_back(std::move(step));
      }
    }
  }
  return found;
}

bool Recipe::has_transform(Site site) const {
  return std::ranges::any_of(
      transforms(), [&](const TransformStep& step) { return std::ranges::find(step.at, site) != step.at.end(); });
}

bool Recipe::has_mean_shift() const {
  return std::ranges::any_of(steps_of<PointsStep>(),
                             [](const PointsStep* step) { return step->shift == PointsStep::Shift::kMean; });
}

bool Recipe::learns() const {
  return std::ranges::any_of(steps_of<LearnStep>(), [](const LearnStep* step) { return step->learns(); });
}

bool Recipe::rounding_needs_moments() const {
  return std::ranges::any_of(steps_of<RoundStep>(), [](const RoundStep* step) { return needs_moments(*step); });
}

bool Recipe::needs_calibration() const {
  const bool measures = std::ranges::any_of(steps_of<TransformStep>(), [](const TransformStep* step) {
    return step->kind == StepKind::kBalance || step->kind == StepKind::kSmooth || step->kind == StepKind::kSearch ||
           step->kind == StepKind::kCoarseToFine || needs_tokens(*step);
  });
  return measures || !steps_of<ChooseStep>().empty() || rounding_needs_moments() || has_mean_shift() || learns();
}

QuantizationConfig Recipe::quantization_config() const {
  const RoundStep* round = round_step();
  QuantizationConfig config{.weights = grids.weights,
                            .lora_rank = round && round->low_rank ? round->low_rank->rank : 0,
                            .input_activations = grids.input_activations,
                            .kv_cache = grids.kv_cache,
                            .head = grids.head,
                            .embedding = grids.embedding};
  for (const PointsStep* step : steps_of<PointsStep>()) {
    for (const Site site : step->at) {
      config.runtime.erase(site);
      if (step->runtime) config.runtime[site] = *step->runtime;
    }
  }
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
