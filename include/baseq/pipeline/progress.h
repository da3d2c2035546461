#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#pragma GCC visibility push(default)
namespace baseq {

/// What a run tells its caller, in the order of events:
///
///     job.progress = [](const ProgressEvent& event) {
///       if (const auto* linear = std::get_if<LinearRounded>(&event)) std::puts(linear->name.c_str());
///     };
struct RunStarted {
  std::string model;  ///< name of the checkpoint's directory
  int64_t num_blocks = 0;
  int64_t num_samples = 0, seq_len = 0;  ///< calibration windows and tokens in each; 0: none
  uint64_t seed = 0;
  std::string device;
  int64_t num_threads = 0;
};
struct RunResumed {
  int64_t num_finished, num_blocks;  ///< the finished ones come from the work directory
  std::string stage{};               ///< of the block behind them, also from there: the last one it finished; or empty
};
struct BlockStarted {
  int64_t block, num_blocks;
  int64_t pass = 0;  ///< of the recipe, which takes each block once per pass
};
struct LinearRounded {
  int64_t block;
  std::string name;       ///< "self_attn.q_proj"
  double relative_error;  ///< of its output over the calibration inputs; of its weight without calibration
  double damping;
  double seconds;
};
struct EpochLearned {
  int64_t block;
  std::string stage;
  int64_t epoch, num_epochs;  ///< from 1
  double loss;                ///< over the monitored windows
};
struct StageLearned {
  int64_t block;
  std::string stage;
  double loss_before, loss_after;
  double seconds;
};
/// Values at a quant point. A row is what one scale covers: a token, or a token and head of the cache.
struct ActivationRange {
  double min = 0, max = 0;
  double rms = 0;
  double peak =
      0;  ///< mean over rows of max|x| / rms(x): 1 for a row of equal magnitudes, sqrt(row size) for one spike
  /// Standard deviation over channels of the norm of a channel over tokens, arXiv 2506.01967: 0 where all channels are
  /// equally loud. NaN: unknown, in an older log.
  double difficulty = 0;
};
/// A quant point of a block that is done: ranges over about 2048 calibration tokens, and what was chosen or learned.
struct PointMeasured {
  int64_t block;
  std::string name;                                           ///< "mlp.down_proj.input_quant"
  ActivationRange before;                                     ///< in the original block, at the same place
  ActivationRange after;                                      ///< what the grid is given: transformed, gain * x - shift
  bool enabled = false;                                       ///< whether there is a grid
  std::vector<double> clip{};                                 ///< ratios, flattened; empty: the full range
  std::optional<double> min_gain{}, max_gain{}, max_shift{};  ///< over the channels; largest |shift|
};
/// What a choose step kept at a site.
struct TransformChosen {
  int64_t block;
  std::string site;
  int64_t chosen;               ///< index in ChooseStep::from
  std::string chain;            ///< its kinds, such as "smooth, hadamard"; "none" for an empty one
  std::vector<double> scores{};  ///< of every chain; of ChooseStep::By::kRms the root mean square alone
};
struct BlockFinished {
  int64_t block, num_blocks;
  double
      relative_error;  ///< median over tokens of |quantized - full|^2 / |full|^2 of the block's output; NaN if unknown
  double seconds;
  int64_t peak_memory_bytes = 0;  ///< of the process so far
};
struct Warning {
  std::string message;
};
struct RunFinished {
  double seconds;  ///< of this process
};
using ProgressEvent = std::variant<RunStarted, RunResumed, BlockStarted, LinearRounded, EpochLearned, StageLearned,
                                   PointMeasured, BlockFinished, Warning, RunFinished, TransformChosen>;
using ProgressFn = std::function<void(const ProgressEvent&)>;

/// An object with "event" ("block_finished") and the fields of the event; NaN and infinities become null.
nlohmann::json to_json(const ProgressEvent& event);
/// Reads what to_json wrote; nothing for an event of a kind it does not know. Throws c10::Error naming `path` and key.
std::optional<ProgressEvent> progress_event_from_json(const nlohmann::json& json, const std::string& path);

/// Highest resident memory of this process so far.
int64_t peak_memory_bytes();

}  // namespace baseq
#pragma GCC visibility pop
