#pragma once

#include "baseq/io/run_journal.h"
#include "baseq/pipeline/quantize_checkpoint.h"

namespace baseq {

/// What a work directory says of a run, see read_stored_run. The identity holds what the result depends on: sizes and
/// checksums of the model's files, recipe, seed, device, threads, instruction set, batches and the version of this
/// program. Files whose size and time are the ones that options.work_directory knows are not read again.
RunJournal::Description describe_run(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                                     const std::filesystem::path& output, const QuantizeOptions& options);

}  // namespace baseq
