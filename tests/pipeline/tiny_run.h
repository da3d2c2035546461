#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "../job_of.h"
#include "../tiny_model.h"
#include "baseq/pipeline/job.h"
#include "pipeline/run_log.h"
#include "recipe_texts.h"

namespace baseq::test {

/// Every kind of step and most of their options at once.
inline constexpr const char* kEverything = R"({
  "name": "everything",
  "grids": {
    "weights": {"num_bits": 4},
    "input_activations": {"num_bits": 4, "symmetric": false},
    "kv_cache": {"num_bits": 4, "symmetric": false}
  },
  "token_weights": "inverse_energy",
  "calibration": {"num_samples": 4, "seq_len": 16},
  "steps": [
    {"step": "transform", "kind": "hadamard", "at": ["residual"]},
    {"step": "transform", "kind": "balance", "at": ["qkv", "gate_up", "query_key", "value", "down"]},
    {"step": "transform", "kind": "scale", "at": ["value", "down"]},
    {"step": "transform", "kind": "matrix", "at": ["value"]},
    {"step": "transform", "kind": "hadamard", "at": ["value", "query_key", "o", "down"]},
    {"step": "transform", "kind": "scale", "at": ["o"]},
    {"step": "points", "at": ["o", "down"], "clip": 0.9, "shift": "mean", "stream": "quantized"},
    {"step": "learn", "name": "transforms", "weights": "straight_through", "epochs": 1, "final_rate": 3e-5,
     "stream": "quantized", "num_monitored": 2,
     "rates": {"value.matrix": 0.003, "value.scale": 0.003, "o.scale": 0.003, "down.scale": 0.003, "*.clip": 0.03,
               "*.shift": 0.002}},
    {"step": "points", "at": ["qkv", "gate_up"], "clip": 0.9, "shift": "mean", "stream": "quantized"},
    {"step": "points", "at": ["k_cache", "v_cache"], "clip": 0.95, "shift": "mean", "stream": "quantized"},
    {"step": "round", "method": "gptq", "clip": "search", "compensate_streams": true, "quantized_inputs": true,
     "low_rank": {"rank": 3}},
    {"step": "learn", "name": "activations", "epochs": 2, "final_rate": 3e-6, "stream": "quantized",
     "num_monitored": 2, "rates": {"*.clip": 0.03, "*.shift": 0.002, "*.gain": 0.003}}
  ]})";

/// Online transforms, one learn step.
inline constexpr const char* kOnline = R"({
  "name": "online",
  "grids": {
    "weights": {"num_bits": 4, "symmetric": false},
    "input_activations": {"num_bits": 4},
    "kv_cache": {"num_bits": 4}
  },
  "calibration": {"num_samples": 4, "seq_len": 16},
  "steps": [
    {"step": "transform", "kind": "hadamard", "at": ["qkv", "gate_up", "value", "query_key", "o", "down"]},
    {"step": "points", "at": ["qkv", "o", "gate_up", "down"], "shift": "mean"},
    {"step": "points", "at": ["k_cache", "v_cache"], "shift": "zero"},
    {"step": "round", "method": "gptq"},
    {"step": "learn", "name": "activations", "epochs": 1, "final_rate": 3e-6,
     "rates": {"*.clip": 0.03, "*.shift": 0.002, "*.gain": 0.003}}
  ]})";

/// One of these recipes at 8 bits and without clips, so that the result stays close to the original.
inline Recipe at_eight_bits(const char* text) {
  nlohmann::json recipe = nlohmann::json::parse(text);
  for (nlohmann::json& grid : recipe["grids"]) grid["num_bits"] = 8;
  for (nlohmann::json& step : recipe["steps"]) {
    if (step["step"] == "points") step["clip"] = 1.0;
  }
  return Recipe::from_json(recipe, "recipe");
}

/// Weights alone, rounded to nearest.
inline constexpr const char* kRoundToNearest =
    R"({"grids": {"weights": {"num_bits": 4}}, "steps": [{"step": "round"}]})";

/// The lines of the log of a checkpoint without what differs between two equal runs.
inline std::vector<nlohmann::json> log_without_times(const std::filesystem::path& checkpoint) {
  std::istringstream lines(read_bytes(checkpoint / kRunLogFile));
  std::vector<nlohmann::json> events;
  for (std::string line; std::getline(lines, line);) {
    events.push_back(nlohmann::json::parse(line));
    events.back().erase("seconds");
    events.back().erase("peak_memory_bytes");
  }
  return events;
}

/// A tiny model in `directory / "in"` and runs over it.
class TinyRun : public testing::Test {
 protected:
  explicit TinyRun(const TinyShape& tiny = {}) : shape(tiny) {
    write_checkpoint(directory / "in", shape);
    write_bytes(directory / "in" / "tokenizer.json", "{}");
    original.emplace(directory / "in");
  }
  void run(const Recipe& recipe, const char* output, const QuantizeOptions& options = {},
           const ProgressFn& progress = {}) {
    quantize(test::job_of(*original, recipe, recipe.needs_calibration() ? windows : Tensor{}, directory / output,
                          options, progress));
  }
  /// Runs in `work` until the n-th step, from 0; returns the steps that were asked for, n + 1 when it was stopped.
  int64_t run_until(const Recipe& recipe, const char* output, int64_t n, const ProgressFn& progress = {}) {
    int64_t steps = 0;
    try {
      run(recipe, output, {.work_directory = directory / "work", .should_stop = [&] { return steps++ == n; }},
          progress);
    } catch (const Interrupted& interrupted) {
      message = interrupted.what();
      EXPECT_FALSE(std::filesystem::exists(directory / output));
    }
    return steps;
  }
  void forget(const char* output) const {
    std::filesystem::remove_all(directory / "work");
    std::filesystem::remove_all(directory / output);
  }
  Tensor logits(const char* name) const { return Model(Checkpoint(directory / name)).logits(ids); }
  /// All files but the log, to the last byte.
  /// @param same_recipe false: also but those that tell the recipe
  void expect_same_files(const char* a, const char* b, bool same_recipe = true) const {
    ASSERT_EQ(list(directory / a), list(directory / b));
    for (const std::string& file : list(directory / a)) {
      if (file == kRunLogFile || (!same_recipe && (file == "config.json" || file == "README.md"))) continue;
      EXPECT_EQ(read_bytes(directory / a / file), read_bytes(directory / b / file)) << file;
    }
  }
  /// The logs without what differs between two equal runs.
  void expect_same_run(const char* a, const char* b) const {
    expect_same_files(a, b);
    EXPECT_EQ(log_without_times(directory / a), log_without_times(directory / b));
  }

  std::string message;  ///< of the last interruption of run_until
  TinyShape shape;
  TempDirectory directory;
  std::optional<Checkpoint> original;
  Tensor windows = random_ids({4, 16}, shape.vocab_size, 3);
  Tensor ids = random_ids({2, 11}, shape.vocab_size, 4);
};

}  // namespace baseq::test
