#include "block_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "cayley_sgd.h"
#include "shuffle.h"

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

/// Samples of all pools in turn, those of a pool in the order that they have.
std::vector<int64_t> taken_in_turn(const std::vector<int64_t>& order, const std::vector<int64_t>& pools) {
  if (pools.empty()) return order;
  std::map<int64_t, int64_t> taken;                       // of each pool
  std::map<std::pair<int64_t, int64_t>, int64_t> sorted;  // by turn and pool
  for (const int64_t sample : order) {
    const int64_t pool = pools.at(static_cast<size_t>(sample));
    sorted[{taken[pool]++, pool}] = sample;
  }
  std::vector<int64_t> result;
  for (const auto& [turn, sample] : sorted) result.push_back(sample);
  return result;
}

/// The rules of all groups.
class Rules {
 public:
  explicit Rules(const std::vector<ParameterGroup>& groups) : groups_(groups) {
    std::vector<torch::optim::OptimizerParamGroup> adam;
    for (const ParameterGroup& group : groups) {
      if (group.rule != LearnStep::Rule::kAdam) continue;
      const auto options = torch::optim::AdamWOptions(group.learning_rate).weight_decay(0).eps(group.epsilon);
      adam.emplace_back(group.parameters, std::make_unique<torch::optim::AdamWOptions>(options));
    }
    if (!adam.empty()) adam_.emplace(adam);
  }

  void forget_gradients() {
    for (const ParameterGroup& group : groups_) {
      for (const Tensor& parameter : group.parameters) parameter.mutable_grad().reset();
    }
  }

  /// @param share where between its final rate and its first one each group is, 0 to 1
  void step(double final_learning_rate, double share) {
    size_t index = 0;
    for (const ParameterGroup& group : groups_) {
      const double final_rate = std::min(final_learning_rate, group.learning_rate);
      const double rate = final_rate + (group.learning_rate - final_rate) * share;
      if (group.rule == LearnStep::Rule::kAdam) {
        adam_->param_groups()[index++].options().set_lr(rate);
      } else if (group.rule == LearnStep::Rule::kSign) {
        step_by_sign(group.parameters, rate);
      } else {
        for (const Tensor& matrix : group.parameters) {
          if (matrix.grad().defined()) cayley_step(matrix, matrix.grad(), rate);
        }
      }
    }
    if (adam_) adam_->step();
    const c10::NoGradGuard no_grad;
    for (const ParameterGroup& group : groups_) {
      if (group.project) group.project();
    }
  }

 private:
  static void step_by_sign(const std::vector<Tensor>& parameters, double rate) {
    const c10::NoGradGuard no_grad;
    for (Tensor parameter : parameters) {
      if (parameter.grad().defined()) parameter.sub_(parameter.grad().sign(), rate);
    }
  }

  const std::vector<ParameterGroup>& groups_;
  std::optional<torch::optim::AdamW> adam_;
};

/// What is left of the way from the first learning rate to the last one.
double rate_share(LearnStep::Schedule schedule, int64_t step, int64_t num_steps) {
  switch (schedule) {
    case LearnStep::Schedule::kCosine:
      return 0.5 * (1 + std::cos(std::numbers::pi * static_cast<double>(step) / num_steps));
    case LearnStep::Schedule::kLinear:
      return 1 - static_cast<double>(step) / num_steps;
    case LearnStep::Schedule::kConstant:
      return 1;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LearnStep::Schedule");
}

int64_t steps_per_epoch(const OptimizeOptions& options, int64_t num_samples) {
  return (num_samples + options.batch_size - 1) / options.batch_size;
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

int64_t OptimizeOptions::num_epochs(int64_t num_samples) const {
  if (steps == 0) return epochs;
  const int64_t each = steps_per_epoch(*this, num_samples);
  return (steps + each - 1) / each;
}

OptimizeResult optimize_block(const std::function<Tensor(const Tensor&)>& loss, const std::function<double()>& monitor,
                              int64_t num_samples, const std::vector<ParameterGroup>& groups,
                              const OptimizeOptions& options) {
  TORCH_CHECK(num_samples > 0 && options.batch_size > 0 && (options.steps > 0 || options.epochs > 0),
              "optimize_block: samples, epochs or steps, and batch size must be positive, got ", num_samples, ", ",
              options.epochs, " or ", options.steps, ", and ", options.batch_size);
  TORCH_CHECK(std::any_of(groups.begin(), groups.end(), [](const auto& group) { return !group.parameters.empty(); }),
              "optimize_block: there are no parameters to learn");
  const at::AutoGradMode with_grad(true);
  const auto measure = [&] {
    const c10::NoGradGuard no_grad;
    return monitor();
  };
  Rules rules(groups);
  const int64_t num_epochs = options.num_epochs(num_samples);
  const int64_t num_steps = options.steps > 0 ? options.steps : steps_per_epoch(options, num_samples) * num_epochs;
  std::mt19937_64 random(options.seed);
  std::vector<int64_t> order(static_cast<size_t>(num_samples));
  std::iota(order.begin(), order.end(), 0);

  OptimizeResult result;
  result.loss_before = result.loss_after = measure();
  std::vector<Tensor> best = snapshot(groups), unread;
  int64_t step = 0;
  for (int64_t epoch = 1; epoch <= num_epochs && !result.stopped_at_nonfinite; ++epoch) {
    shuffle(order, random);
    const std::vector<int64_t> samples = taken_in_turn(order, options.pools);
    for (int64_t begin = 0; begin < num_samples && step < num_steps; begin += options.batch_size, ++step) {
      const int64_t count = std::min(options.batch_size, num_samples - begin);
      rules.forget_gradients();
      const Tensor value = loss(at::tensor(at::ArrayRef<int64_t>(samples.data() + begin, count), at::kLong));
      unread.push_back(value.detach());
      // On other devices, looking at a loss waits for all that was asked for: those of an epoch are read at its end.
      result.stopped_at_nonfinite = value.is_cpu() && !read_losses(unread, result.losses);
      if (result.stopped_at_nonfinite) break;
      value.backward();
      rules.step(options.final_learning_rate, rate_share(options.schedule, step, num_steps));
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
