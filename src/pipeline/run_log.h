#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/pipeline/job.h"

namespace baseq {

/// The file of a quantized checkpoint that tells how it was made: one event of its run a line, those of a resumed run
/// as if it had not been interrupted. Nothing that runs the model reads it. It holds times: the only file of a
/// checkpoint whose bytes differ between two equal runs.
inline constexpr const char* kRunLogFile = "quantization_log.jsonl";

/// What happened in one block, or in passes over the model.
struct BlockRecord {
  std::vector<LinearRounded> linears;
  std::vector<EpochLearned> epochs;
  std::vector<StageLearned> stages;
  std::vector<PointMeasured> points;
  std::vector<TransformChosen> choices;
  std::optional<BlockFinished> finished;
};

/// The events of a run by block.
struct RunRecord {
  std::optional<RunStarted> started;
  std::map<int64_t, BlockRecord> blocks;
  BlockRecord model;  ///< of kWholeModel
  std::vector<std::string> warnings;

  void add(const ProgressEvent& event);
  double seconds() const;             ///< of the finished blocks and passes over the model
  int64_t peak_memory_bytes() const;  ///< 0: unknown
};

/// Reads kRunLogFile, or what `quantize --log-json` wrote; a last line that has no end is left out.
/// Throws c10::Error naming file and line.
RunRecord read_run_log(const std::filesystem::path& file);

/// The event on one line, with its end.
std::string log_line(const nlohmann::json& event);

}  // namespace baseq
