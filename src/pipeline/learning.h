#pragma once

#include <functional>
#include <vector>

#include "baseq/pipeline/job.h"
#include "baseq/pipeline/recipe.h"
#include "block_optimizer.h"
#include "parameters.h"

namespace baseq {

/// One learn step at one place, a block or kWholeModel.
struct Learning {
  const LearnStep& step;
  int64_t place;
  uint64_t seed = 0;
  const ProgressFn& report;
  std::vector<int64_t> pools{};  ///< see OptimizeOptions

  /// Learns the parameters, tells of every epoch and of the result. On return they hold the best state.
  /// @param loss        see optimize_block
  /// @param monitored   the loss of a state over the monitored windows
  /// @param num_windows of which `loss` is given numbers
  OptimizeResult run(const std::vector<Parameter>& parameters, const std::function<Tensor(const Tensor&)>& loss,
                     const std::function<double()>& monitored, int64_t num_windows) const;
};

/// Windows of which every token counts, int64: one that does not would make the loss of its window NaN.
/// @param token_weights [num_windows, seq_len]
Tensor countable_windows(const Tensor& token_weights);

}  // namespace baseq
