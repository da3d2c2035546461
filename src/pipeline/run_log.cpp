#include "pipeline/run_log.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <fstream>

#include "../io/strict_json.h"

namespace baseq {

void RunRecord::add(const ProgressEvent& event) {
  const auto block = [&](const auto& e) -> BlockRecord& { return e.block == kWholeModel ? model : blocks[e.block]; };
  if (const auto* run = std::get_if<RunStarted>(&event)) started = *run;
  if (const auto* linear = std::get_if<LinearRounded>(&event)) block(*linear).linears.push_back(*linear);
  if (const auto* epoch = std::get_if<EpochLearned>(&event)) block(*epoch).epochs.push_back(*epoch);
  if (const auto* stage = std::get_if<StageLearned>(&event)) block(*stage).stages.push_back(*stage);
  if (const auto* point = std::get_if<PointMeasured>(&event)) block(*point).points.push_back(*point);
  if (const auto* choice = std::get_if<TransformChosen>(&event)) block(*choice).choices.push_back(*choice);
  if (const auto* finished = std::get_if<BlockFinished>(&event)) {
    std::optional<BlockFinished>& known = block(*finished).finished;
    const double before = known ? known->seconds : 0;  // in an earlier pass
    known = *finished;
    known->seconds += before;
  }
  if (const auto* warning = std::get_if<Warning>(&event)) warnings.push_back(warning->message);
  // A log that is appended to may hold the start of a block that an earlier process did not finish. A later pass adds
  // to what the first one told.
  if (const auto* begun = std::get_if<BlockStarted>(&event); begun && begun->pass == 0) block(*begun) = {};
}

double RunRecord::seconds() const {
  double sum = model.finished ? model.finished->seconds : 0;
  for (const auto& [index, block] : blocks) sum += block.finished ? block.finished->seconds : 0;
  return sum;
}

int64_t RunRecord::peak_memory_bytes() const {
  int64_t peak = model.finished ? model.finished->peak_memory_bytes : 0;
  for (const auto& [index, block] : blocks) {
    if (block.finished) peak = std::max(peak, block.finished->peak_memory_bytes);
  }
  return peak;
}

RunRecord read_run_log(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  TORCH_CHECK(stream.good(), file.string(), ": cannot be opened");
  RunRecord record;
  std::string line;
  for (int64_t number = 1; std::getline(stream, line); ++number) {
    if (stream.eof()) break;
    const std::string where = file.string() + ":" + std::to_string(number);
    const nlohmann::json value = parse_json(line, where, DuplicateKeys::kLastWins);
    if (const auto event = progress_event_from_json(value, where)) record.add(*event);
  }
  return record;
}

std::string log_line(const nlohmann::json& event) {
  return event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace baseq
