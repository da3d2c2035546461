#pragma once

#include <optional>
#include <string>
#include <vector>

#include "baseq/pipeline/job.h"

namespace baseq {

/// The memory or disk space of a run by parts, in bytes. An estimate: it counts the large tensors.
struct Footprint {
  struct Part {
    std::string what;
    int64_t bytes = 0;
  };
  std::vector<Part> parts;

  int64_t bytes() const;  ///< of all parts
};

/// A forecast of quantize(job).
struct RunPlan {
  std::vector<std::string> problems;  ///< each a sentence; one is enough to end the run
  std::vector<std::string> warnings;
  Footprint memory;
  /// Bytes that will be written, by directory.
  std::vector<Footprint::Part> disk;
  int64_t num_blocks = 0;
};

/// Looks for everything that would end the run sooner or later, without working: a checkpoint that cannot be opened or
/// is quantized already, tensors that are missing, of another shape, not finite or not used, sizes without a Hadamard
/// matrix, groups that do not divide, windows that are missing, token ids that the model does not know, an output that
/// exists or cannot be written, too little room on the disks or in memory. Warnings also say what of the checkpoint the
/// output does not get. Reads every weight once.
///
///     for (const std::string& problem : plan(job).problems) std::puts(problem.c_str());
///
/// Where the recipe needs windows and there are none, memory and disk are those of the recipe's own numbers.
RunPlan plan(const Job& job);

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
/// Throws c10::Error when the recipe is not valid or the model cannot be opened.
MemoryFit fit_memory(const Job& job, int64_t budget);

}  // namespace baseq
