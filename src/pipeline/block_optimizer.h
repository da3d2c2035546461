#pragma once

#include <functional>
#include <vector>

#include "baseq/tensor.h"

namespace baseq {

struct ParameterGroup {
  std::vector<Tensor> parameters;  ///< leaves that require gradients
  double learning_rate = 1e-3;
  double epsilon = 1e-8;  ///< AdamW's, which should be small next to the gradients
};

struct OptimizeOptions {
  int64_t epochs = 1;
  int64_t batch_size = 1;            ///< samples a step
  double final_learning_rate = 0.0;  ///< the cosine of every group ends here
  uint64_t seed = 0;                 ///< of the order of the samples
  /// Called after each epoch, from 1, with its monitor(); may be empty.
  std::function<void(int64_t epoch, double loss)> on_epoch{};
};

struct OptimizeResult {
  double loss_before = 0;             ///< monitor() at the start
  double loss_after = 0;              ///< monitor() of the state that was kept, never above loss_before
  int64_t best_epoch = 0;             ///< 0: the start
  std::vector<double> losses;         ///< of every step
  bool stopped_at_nonfinite = false;  ///< NaN or Inf ended the learning early
};

/// AdamW without weight decay and with a cosine learning rate over `num_samples` samples. Knows neither a model nor a
/// quantizer: `loss` maps sample indices (int64 [batch]) to a scalar that depends on the parameters, `monitor` returns
/// the loss by which the best state is chosen after each epoch. On return the parameters hold the best state.
OptimizeResult optimize_block(const std::function<Tensor(const Tensor& indices)>& loss,
                              const std::function<double()>& monitor, int64_t num_samples,
                              const std::vector<ParameterGroup>& groups, const OptimizeOptions& options);

}  // namespace baseq
