#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

namespace baseq {

/// What a run tells its caller, in the order of events.
struct RunResumed {
  int64_t num_finished, num_blocks;  ///< the finished ones come from the work directory
};
struct BlockStarted {
  int64_t block, num_blocks;
};
struct LinearRounded {
  int64_t block;
  std::string name;       ///< "self_attn.q_proj"
  double relative_error;  ///< of its output over the calibration inputs; of its weight without calibration
  double damping;
  double seconds;
};
struct StageLearned {
  int64_t block;
  std::string stage;
  double loss_before, loss_after;
  double seconds;
};
struct BlockFinished {
  int64_t block, num_blocks;
  double
      relative_error;  ///< median over tokens of |quantized - full|^2 / |full|^2 of the block's output; NaN if unknown
  double seconds;
};
struct Warning {
  std::string message;
};
using ProgressEvent = std::variant<RunResumed, BlockStarted, LinearRounded, StageLearned, BlockFinished, Warning>;
using ProgressFn = std::function<void(const ProgressEvent&)>;

}  // namespace baseq
