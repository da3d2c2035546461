#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "baseq/pipeline/footprint.h"
#include "baseq/pipeline/quantize_checkpoint.h"

namespace baseq {

/// A forecast of a run of quantize_checkpoint.
struct RunPlan {
  std::vector<std::string> problems;  ///< each a sentence; one is enough to end the run
  std::vector<std::string> warnings;
  Footprint memory;
  /// Bytes that will be written, by directory.
  std::vector<Footprint::Part> disk;
  int64_t num_blocks = 0;
};

/// Looks for everything that would end the run sooner or later, without working: a checkpoint that is quantized
/// already, tensors that are missing, of another shape, not finite or not used, sizes without a Hadamard matrix, groups
/// that do not divide, token ids that the model does not know, an output that exists or cannot be written, too little
/// room on the disks or in memory. Warnings also say what of the checkpoint the output does not get. Reads every weight
/// once.
/// @param windows may be undefined even where the recipe needs some; then the recipe's own numbers count
RunPlan plan_run(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                 const std::filesystem::path& output, const QuantizeOptions& options);

/// Settings outside the recipe that determine memory use.
struct MemoryChoice {
  int64_t tokens_per_batch = kTokensPerBatch;
  bool activations_on_disk = false;
  int64_t bytes = 0;  ///< needed, as estimated
};
/// The first of the possible choices that fits a budget.
struct MemoryFit {
  std::optional<MemoryChoice> choice;
  MemoryChoice smallest;  ///< the one that needs least, whether it fits or not
};
/// Full batches and streams in memory where `budget` bytes allow it, else streams on disk, then ever smaller batches.
MemoryFit fit_memory(const Checkpoint& checkpoint, const Recipe& recipe, int64_t num_windows, int64_t seq_len,
                     int64_t budget);

}  // namespace baseq
