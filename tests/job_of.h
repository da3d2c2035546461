#pragma once

#include <algorithm>
#include <filesystem>
#include <utility>
#include <variant>

#include "baseq/pipeline/job.h"

namespace baseq::test {

inline Job job_of(std::variant<std::filesystem::path, StoredModel> model, Recipe recipe, Tensor windows,
                  std::filesystem::path output, QuantizeOptions options = {}, ProgressFn progress = {}) {
  return {.model = std::move(model),
          .recipe = std::move(recipe),
          .windows = std::move(windows),
          .output = std::move(output),
          .options = std::move(options),
          .progress = std::move(progress)};
}

/// `recipe` in a second of time, with groups and blocks that divide the sizes of tiny models.
inline Recipe shortened(Recipe recipe) {
  if (auto& weights = recipe.grids.weights; weights && weights->strategy == Strategy::kGroup) {
    weights->group_size = std::min<int64_t>(weights->group_size, 32);
  }
  for (Pass& pass : recipe.passes) {
    for (Step& step : pass.steps) {
      if (auto* transform = std::get_if<TransformStep>(&step)) {
        transform->block_size = std::min<int64_t>(transform->block_size, 32);
      }
      if (auto* learn = std::get_if<LearnStep>(&step)) {
        learn->epochs = std::min<int64_t>(learn->epochs, 1);
        learn->steps = std::min<int64_t>(learn->steps, 1);
      }
      auto* round = std::get_if<RoundStep>(&step);
      if (round && round->low_rank) round->low_rank->steps = std::min<int64_t>(round->low_rank->steps, 10);
    }
  }
  return recipe;
}

}  // namespace baseq::test
