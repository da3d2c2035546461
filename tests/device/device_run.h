#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "../job_of.h"
#include "../pipeline/tiny_run.h"
#include "baseq/model/model.h"
#include "sealed_device.h"

namespace baseq::test {

/// Runs over tests/data/tiny_llama_base on the CPU and on the sealed device.
class DeviceRun : public testing::Test {
 protected:
  /// What a run told.
  struct Told {
    std::map<std::string, LinearRounded> linears;  ///< by block and name
    std::map<std::string, StageLearned> stages;
    std::vector<std::string> warnings;
  };

  Told run(const Recipe& recipe, const std::string& output, QuantizeOptions options) const {
    Told told;
    const auto key = [](const auto& event, const std::string& name) {
      return std::to_string(event.block) + " " + name;
    };
    const auto progress = [&](const ProgressEvent& event) {
      if (const auto* linear = std::get_if<LinearRounded>(&event)) told.linears[key(*linear, linear->name)] = *linear;
      if (const auto* stage = std::get_if<StageLearned>(&event)) told.stages[key(*stage, stage->stage)] = *stage;
      if (const auto* warning = std::get_if<Warning>(&event)) told.warnings.push_back(warning->message);
    };
    quantize(job_of(original, recipe, recipe.needs_calibration() ? windows : Tensor{}, directory / output,
                    std::move(options), progress));
    return told;
  }
  Told run_on_device(const Recipe& recipe, const std::string& output, QuantizeOptions options = {}) const {
    options.device = sealed_device();
    return run(recipe, output, std::move(options));
  }
  Tensor logits(const std::string& name) const { return Model(Checkpoint(directory / name)).logits(ids); }

  /// All files but the log, to the last byte.
  void expect_same_files(const std::string& a, const std::string& b) const {
    ASSERT_EQ(list(directory / a), list(directory / b));
    for (const std::string& file : list(directory / a)) {
      if (file == kRunLogFile) continue;
      EXPECT_EQ(read_bytes(directory / a / file), read_bytes(directory / b / file)) << file;
    }
  }

  TempDirectory directory;
  Checkpoint original{golden_directory("llama_base")};
  Tensor windows = random_ids({4, 16}, 128, 3), ids = random_ids({2, 11}, 128, 4);
};

}  // namespace baseq::test
