#pragma once

#include <filesystem>

#include "baseq/io/checkpoint.h"
#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

struct QuantizeOptions {
  at::Device device = at::kCPU;
  uint64_t seed = 0;  ///< of the order in which learning visits the windows
  /// Directory of the mapped files that hold the activation streams; empty: they stay in memory.
  std::filesystem::path activations_directory;
  CheckpointWriter::Options output;
  ProgressFn progress;  ///< may be empty
};

/// Quantizes a Hugging Face checkpoint into a native one, block by block: at any time one block's weights and the
/// activation streams (two, and the block's full-precision output) are held.
/// @param windows int64 [num_samples, seq_len], see read_calibration; may be undefined when the recipe needs none
/// Throws c10::Error when the checkpoint is already quantized, the recipe needs windows and has none, or the output
/// exists. The output directory appears only when it is complete.
void quantize_checkpoint(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                         const std::filesystem::path& output, const QuantizeOptions& options = {});

}  // namespace baseq
