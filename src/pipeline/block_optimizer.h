#pragma once

#include <functional>
#include <vector>

#include "baseq/pipeline/recipe.h"
#include "baseq/tensor.h"

namespace baseq {

struct ParameterGroup {
  std::vector<Tensor> parameters;  ///< leaves that require gradients
  double learning_rate = 1e-3;
  double epsilon = 1e-8;  ///< AdamW's, which should be small next to the gradients
  LearnStep::Rule rule = LearnStep::Rule::kAdam;
  std::function<void()> project{};  ///< called after each step: puts the parameters back into their range; may be empty
};

struct OptimizeOptions {
  int64_t epochs = 1;
  int64_t steps = 0;                 ///< unless 0, learning ends after so many steps and not after `epochs`
  int64_t batch_size = 1;            ///< samples a step
  double final_learning_rate = 0.0;  ///< the schedule of every group ends here
  LearnStep::Schedule schedule = LearnStep::Schedule::kCosine;
  uint64_t seed = 0;  ///< of the order of the samples
  /// By sample, the pool that it is in: a step takes samples of all pools in turn. Empty: they are all in one.
  std::vector<int64_t> pools{};
  /// Called after each epoch, from 1, with its monitor(); may be empty.
  std::function<void(int64_t epoch, double loss)> on_epoch{};

  /// Walks over `num_samples` samples, the last of which may end early.
  int64_t num_epochs(int64_t num_samples) const;
};

struct OptimizeResult {
  double loss_before = 0;             ///< monitor() at the start
  double loss_after = 0;              ///< monitor() of the state that was kept, never above loss_before
  int64_t best_epoch = 0;             ///< 0: the start
  std::vector<double> losses;         ///< of every step
  bool stopped_at_nonfinite = false;  ///< NaN or Inf ended the learning early
};

/// Learns over `num_samples` samples, each group by its rule: AdamW without weight decay, or SignSGD, which moves every
/// value whose gradient is not 0 by the learning rate. Knows neither a model nor a quantizer: `loss` maps sample
/// indices (int64 [batch]) to a scalar that depends on the parameters, `monitor` returns the loss by which the best
/// state is chosen after each epoch. On return the parameters hold the best state.
OptimizeResult optimize_block(const std::function<Tensor(const Tensor& indices)>& loss,
                              const std::function<double()>& monitor, int64_t num_samples,
                              const std::vector<ParameterGroup>& groups, const OptimizeOptions& options);

}  // namespace baseq
