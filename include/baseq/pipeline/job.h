#pragma once

#include <filesystem>
#include <functional>
#include <variant>

#include "baseq/io/checkpoint.h"
#include "baseq/model/stored_model.h"
#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Tokens in a batch of a forward pass, in whole windows: enough for efficient matrix products, little next to a
/// block's weights. Smaller batches use less memory but change the summation order, and with it the last bits of the
/// result.
inline constexpr int64_t kTokensPerBatch = 2048;

/// How a job is done. Only `device`, `seed` and `tokens_per_batch` change the bytes of the result.
struct QuantizeOptions {
  at::Device device = at::kCPU;
  uint64_t seed = 0;  ///< of calibration_windows() and of the order in which learning visits the windows
  /// Directory of the mapped files that hold the activation streams; empty: they stay in memory.
  std::filesystem::path activations_directory{};
  int64_t tokens_per_batch = kTokensPerBatch;
  CheckpointWriter::Options output{};  ///< size of the shards, whether an existing checkpoint is replaced
  /// Keeps finished blocks, finished stages of the next one and the streams. A job that finds its own continues it, to
  /// the same bytes. Empty: nothing is kept.
  std::filesystem::path work_directory{};
  /// Asked before each step of a block (a batch, a linear, a step of learning); true ends the run with Interrupted.
  /// What the work directory holds by then is kept: the blocks before, and this one up to the stage that it has
  /// finished. May be empty.
  std::function<bool()> should_stop{};
};

/// What to quantize, how, and where the result goes. Everything that plans, measures or quantizes takes one:
///
///     Job job{.model = "SmolLM2-135M-Instruct", .recipe = Recipe::read("gptq-w4a16-g64"), .output = "out"};
///     job.windows = calibration_windows("calibration.txt", job);
///     job.progress = [](const ProgressEvent& event) { /* std::get_if<BlockFinished>(&event) */ };
///     if (plan(job).problems.empty()) quantize(job);
struct Job {
  std::variant<std::filesystem::path, StoredModel> model{};  ///< an original checkpoint: its directory, or open
  Recipe recipe{};
  Tensor windows{};  ///< integers [num_samples, seq_len]; undefined for a recipe that needs none
  std::filesystem::path output{};
  QuantizeOptions options{};
  ProgressFn progress{};  ///< may be empty; what it throws ends the run
};

/// Calibration windows of a file as the job's recipe asks for them, tokenized as its model does: int64 [num_samples,
/// seq_len]. Texts (UTF-8, or .jsonl with a "text" per line) are cut at random positions that the seed chooses; of a
/// .safetensors file with windows `input_ids` the first ones are taken.
/// Throws c10::Error naming the file when it is too short, no text, or the model has no tokenizer.
Tensor calibration_windows(const std::filesystem::path& file, const Job& job);

}  // namespace baseq
