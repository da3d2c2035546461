#pragma once

#include <filesystem>
#include <functional>
#include <stdexcept>

#include "baseq/io/checkpoint.h"
#include "baseq/pipeline/activations.h"
#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

struct QuantizeOptions {
  at::Device device = at::kCPU;
  uint64_t seed = 0;  ///< of the order in which learning visits the windows
  /// Directory of the mapped files that hold the activation streams; empty: they stay in memory.
  std::filesystem::path activations_directory;
  int64_t tokens_per_batch = kTokensPerBatch;  ///< of a forward pass; the bytes of the result depend on it
  CheckpointWriter::Options output;
  /// Keeps finished blocks, finished stages of the next one and the streams, see RunJournal; a run that finds its own
  /// continues it, to the same bytes. Empty: nothing is kept.
  std::filesystem::path work_directory;
  /// Asked before each step of a block (a batch, a linear, a step of learning); true ends the run with Interrupted.
  /// What the work directory holds by then is kept: the blocks before, and this one up to the stage that it has
  /// finished. May be empty.
  std::function<bool()> should_stop;
  ProgressFn progress;  ///< may be empty
};

/// QuantizeOptions::should_stop ended a run.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A run as its work directory describes it: all that continuing it takes.
struct StoredRun {
  std::filesystem::path model, output;
  Recipe recipe;
  Tensor windows;  ///< may be undefined
  QuantizeOptions options;
  int64_t num_threads = 1;  ///< the bytes of the result depend on it
};
/// Throws c10::Error when `work_directory` holds no run.
StoredRun read_stored_run(const std::filesystem::path& work_directory);

/// Quantizes a Hugging Face checkpoint into a native one, block by block: at any time one block's weights and the
/// activation streams (two, and the block's full-precision output) are held.
/// @param windows int64 [num_samples, seq_len], see read_calibration; may be undefined when the recipe needs none
/// Throws c10::Error when the recipe is not valid, the checkpoint is already quantized, the recipe needs windows and
/// has none, the output exists, or the work directory holds a run with another model, recipe, windows, seed or number
/// of threads. The output directory appears only when it is complete.
void quantize_checkpoint(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                         const std::filesystem::path& output, const QuantizeOptions& options = {});

/// Seconds that quantize_checkpoint would take, from its first block: quantized with one window and with a few, without
/// writing anything. Throws as quantize_checkpoint does.
double estimate_seconds(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                        const QuantizeOptions& options = {});

}  // namespace baseq
