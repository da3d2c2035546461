#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace baseq::cli {

/// One checkpoint to make and to evaluate.
struct SweepJob {
  std::string name;
  std::string model;   ///< directory, or org/name in the local Hugging Face cache
  std::string recipe;  ///< name or file; empty: the original model, which is only evaluated
  std::map<std::string, nlohmann::json> overrides;  ///< by the path in the recipe

  std::vector<std::string> settings() const;  ///< the overrides as --set takes them
};

/// A file of `baseq sweep`. Paths in it are relative to the current directory, as on the command line.
struct SweepPlan {
  std::filesystem::path output;  ///< directory of all results
  std::string calibration;       ///< may be empty
  std::string text, tokens;      ///< what is evaluated; both empty: nothing
  int64_t seq_len = 2048, max_windows = 0;
  bool reference = true;  ///< KL divergence and agreement with the original model
  std::vector<SweepJob> jobs;
};

/// What would end one of the jobs whatever it is combined with: models and recipes that cannot be read, texts that are
/// missing, jobs that would write over a model. Each a sentence.
std::vector<std::string> find_problems(const SweepPlan& plan, const std::vector<SweepJob>& jobs);

/// Every model with every recipe. Throws c10::Error naming the key that is wrong, or two jobs of one name.
SweepPlan read_sweep_plan(const std::string& file);

}  // namespace baseq::cli
