#include "block_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

namespace baseq {
namespace {

/// The state of every parameter, to go back to.
std::vector<Tensor> snapshot(const std::vector<ParameterGroup>& groups) {
  std::vector<Tensor> copies;
  for (const auto& group : groups) {
    for (const Tensor& parameter : group.parameters) copies.push_back(parameter.detach().clone());
  }
  return copies;
}

void restore(const std::vector<ParameterGroup>& groups, const std::vector<Tensor>& copies) {
  const c10::NoGradGuard no_grad;
  auto copy = copies.begin();
  for (const auto& group : groups) {
    for (Tensor parameter : group.parameters) parameter.copy_(*copy++);
  }
}

/// Fisher-Yates on the generator's own numbers: std::shuffle differs between standard libraries.
void shuffle(std::vector<int64_t>& order, std::mt19937_64& random) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
}

torch::optim::AdamW adamw(const std::vector<ParameterGroup>& groups) {
  std::vector<torch::optim::OptimizerParamGroup> param_groups;
  for (const auto& group : groups) {
    const auto options = torch::optim::AdamWOptions(group.learning_rate).weight_decay(0).eps(group.epsilon);
    param_groups.emplace_back(group.parameters, std::make_unique<torch::optim::AdamWOptions>(options));
  }
  return torch::optim::AdamW(param_groups);
}

/// @param cosine where between its final rate and its first one each group is, 0 to 1
void set_rates(torch::optim::AdamW& optimizer, const std::vector<ParameterGroup>& groups, double final_learning_rate,
               double cosine) {
  for (size_t g = 0; g < groups.size(); ++g) {
    const double final_rate = std::min(final_learning_rate, groups[g].learning_rate);
    optimizer.param_groups()[g].options().set_lr(final_rate + (groups[g].learning_rate - final_rate) * cosine);
  }
}

/// Moves losses into those of the result, up to the first that is not finite; returns whether all are.
bool read_losses(std::vector<Tensor>& unread, std::vector<double>& losses) {
  if (unread.empty()) return true;
  const Tensor values = at::stack(unread).to(at::kCPU, at::kDouble);
  unread.clear();
  for (int64_t i = 0; i < values.numel(); ++i) {
    losses.push_back(values.const_data_ptr<double>()[i]);
    if (!std::isfinite(losses.back())) return false;
  }
  return true;
}

}  // namespace

OptimizeResult optimize_block(const std::function<Tensor(const Tensor&)>& loss, const std::function<double()>& monitor,
                              int64_t num_samples, const std::vector<ParameterGroup>& groups,
                              const OptimizeOptions& options) {
  TORCH_CHECK(num_samples > 0 && options.epochs > 0 && options.batch_size > 0,
              "optimize_block: samples, epochs and batch size must be positive, got ", num_samples, ", ",
              options.epochs, " and ", options.batch_size);
  TORCH_CHECK(std::any_of(groups.begin(), groups.end(), [](const auto& group) { return !group.parameters.empty(); }),
              "optimize_block: there are no parameters to learn");
  const at::AutoGradMode with_grad(true);
  const auto measure = [&] {
    const c10::NoGradGuard no_grad;
    return monitor();
  };
  torch::optim::AdamW optimizer = adamw(groups);
  const int64_t steps_per_epoch = (num_samples + options.batch_size - 1) / options.batch_size;
  const int64_t num_steps = steps_per_epoch * options.epochs;
  std::mt19937_64 random(options.seed);
  std::vector<int64_t> order(static_cast<size_t>(num_samples));
  std::iota(order.begin(), order.end(), 0);

  OptimizeResult result;
  result.loss_before = result.loss_after = measure();
  std::vector<Tensor> best = snapshot(groups), unread;
  int64_t step = 0;
  for (int64_t epoch = 1; epoch <= options.epochs && !result.stopped_at_nonfinite; ++epoch) {
    shuffle(order, random);
    for (int64_t begin = 0; begin < num_samples; begin += options.batch_size, ++step) {
      const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * static_cast<double>(step) / num_steps));
      set_rates(optimizer, groups, options.final_learning_rate, cosine);
      const int64_t count = std::min(options.batch_size, num_samples - begin);
      optimizer.zero_grad();
      const Tensor value = loss(at::tensor(at::ArrayRef<int64_t>(order.data() + begin, count), at::kLong));
      unread.push_back(value.detach());
      // On other devices, looking at a loss waits for all that was asked for: those of an epoch are read at its end.
      result.stopped_at_nonfinite = value.is_cpu() && !read_losses(unread, result.losses);
      if (result.stopped_at_nonfinite) break;
      value.backward();
      optimizer.step();
    }
    result.stopped_at_nonfinite = result.stopped_at_nonfinite || !read_losses(unread, result.losses);
    if (result.stopped_at_nonfinite) break;
    const double current = measure();
    if (options.on_epoch) options.on_epoch(epoch, current);
    // Written so that NaN is not better.
    if (current < result.loss_after) {
      result.loss_after = current;
      result.best_epoch = epoch;
      best = snapshot(groups);
    }
  }
  restore(groups, best);
  return result;
}

}  // namespace baseq
