#pragma once

#include <set>
#include <string>
#include <vector>

#include "baseq/pipeline/job.h"
#include "io/run_journal.h"
#include "pipeline/footprint.h"

namespace baseq {

/// The model of a job, opened where it is a path.
StoredModel stored_model(const Job& job);
std::filesystem::path model_path(const Job& job);

/// What memory and disk of a job depend on besides model and recipe. The streams of `on_device` are on the host.
RunShape shape_of(const Job& job, const Checkpoint& checkpoint);

/// What a job without calibration windows is told whose recipe needs some.
std::string needs_windows(const Recipe& recipe);

/// What a work directory says of a run, see read_stored_run. The identity holds what the result depends on: sizes and
/// checksums of the model's files, recipe, seed, device, threads, instruction set, batches and the version of this
/// program. Files whose size and time are the ones that the work directory knows are not read again.
/// @param recipe that of the job with the grids of its model
RunJournal::Description describe_run(const Job& job, const Checkpoint& checkpoint, const Recipe& recipe);

/// Names of the files and directories that checkpoints of this program have besides weights, config.json and what they
/// have from the source.
std::set<std::string> own_files();

/// How a run writes its output.
CheckpointWriter::Options writer_options(const Job& job);

/// Everything that keeps a run from writing where it is asked to, each a sentence: what CheckpointWriter refuses, and a
/// work directory that lies in the model or the output, or holds one of them.
std::vector<std::string> find_obstacles(const Job& job);

}  // namespace baseq
