#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "../tiny_model.h"
#include "baseq/pipeline/quantize_checkpoint.h"
#include "baseq/pipeline/run_log.h"

namespace baseq::test {

inline Recipe recipe_of(const char* text) { return Recipe::from_json(nlohmann::json::parse(text), "recipe"); }

/// Every stage and option at once.
inline constexpr const char* kEverything = R"({
  "name": "everything",
  "weights": {"num_bits": 4},
  "rounding": {"method": "gptq", "mse_clip": true, "compensate_streams": true, "quantized_inputs": true},
  "low_rank": {"rank": 3},
  "input_activations": {"num_bits": 4, "symmetric": false, "clip": 0.9, "shift": "mean", "norm_shift": "mean"},
  "kv_cache": {"num_bits": 4, "symmetric": false, "clip": 0.95, "shift": "mean"},
  "transforms": {"residual": "hadamard", "value": "hadamard", "query_key": "hadamard", "o": "hadamard",
                 "down": "hadamard", "scale_norm": true, "scale_value": true, "scale_query_key": true,
                 "scale_down": true},
  "learn_transforms": {"epochs": 1}, "learn_activations": {"epochs": 2},
  "objective": {"loss": "relative", "stream": "quantized", "num_monitored": 2},
  "calibration": {"num_samples": 4, "seq_len": 16}})";

/// Online transforms, one learned stage.
inline constexpr const char* kOnline = R"({
  "name": "online",
  "weights": {"num_bits": 4, "symmetric": false},
  "rounding": {"method": "gptq"},
  "input_activations": {"num_bits": 4, "shift": "mean", "norm_shift": "mean"},
  "kv_cache": {"num_bits": 4, "shift": "zero"},
  "transforms": {"input": "hadamard", "value": "hadamard", "query_key": "hadamard", "o": "hadamard",
                 "down": "hadamard"},
  "learn_activations": {"epochs": 1},
  "calibration": {"num_samples": 4, "seq_len": 16}})";

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
  void run(const Recipe& recipe, const char* output, const QuantizeOptions& options = {}) {
    quantize_checkpoint(*original, recipe, recipe.needs_calibration() ? windows : Tensor{}, directory / output,
                        options);
  }
  Tensor logits(const char* name) const { return Model(Checkpoint(directory / name)).logits(ids); }

  TinyShape shape;
  TempDirectory directory;
  std::optional<Checkpoint> original;
  Tensor windows = random_ids({4, 16}, shape.vocab_size, 3);
  Tensor ids = random_ids({2, 11}, shape.vocab_size, 4);
};

}  // namespace baseq::test
