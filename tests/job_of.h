#pragma once

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

}  // namespace baseq::test
