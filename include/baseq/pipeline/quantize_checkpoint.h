#pragma once

#include <stdexcept>

#include "baseq/pipeline/job.h"

namespace baseq {

/// QuantizeOptions::should_stop ended a run.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Quantizes a Hugging Face checkpoint into a native one, block by block: at any time one block's weights and the
/// activation streams (two, and the block's full-precision output) are held. See Job for an example; plan() says
/// beforehand what would go wrong.
/// Throws c10::Error when the recipe is not valid, the checkpoint is already quantized, the recipe needs windows and
/// has none, the output exists, or the work directory holds a run with another model, recipe, windows, seed or number
/// of threads. The output directory appears only when it is complete.
void quantize(const Job& job);

/// Seconds that quantize(job) would take, from its first block: quantized with one window and with a few, without
/// writing anything. Throws as quantize() does.
double estimate_seconds(const Job& job);

/// A run as its work directory describes it: all that continuing it takes.
struct StoredRun {
  Job job{};
  int64_t num_threads = 1;  ///< the bytes of the result depend on it
};
/// The run that QuantizeOptions::work_directory of an earlier job holds; quantize(stored.job) continues it.
/// Throws c10::Error when there is none.
StoredRun read_stored_run(const std::filesystem::path& work_directory);

}  // namespace baseq
