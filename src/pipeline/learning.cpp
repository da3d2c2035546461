#include "learning.h"

#include <ATen/ATen.h>

#include <chrono>

namespace baseq {

OptimizeResult Learning::run(const std::vector<Parameter>& parameters, const std::function<Tensor(const Tensor&)>& loss,
                             const std::function<double()>& monitored, int64_t num_windows) const {
  const auto start = std::chrono::steady_clock::now();
  const auto tell = [&](const ProgressEvent& event) {
    if (report) report(event);
  };
  std::vector<ParameterGroup> groups;
  for (const Parameter& parameter : parameters) {
    using Rule = LearnStep::Rule;
    const Rule rule = parameter.orthogonal ? Rule::kCayley : step.rule == Rule::kCayley ? Rule::kAdam : step.rule;
    groups.push_back({.parameters = parameter.leaves,
                      .learning_rate = parameter.rate,
                      .epsilon = parameter.epsilon,
                      .rule = rule,
                      .project = parameter.project});
  }
  OptimizeOptions options{.epochs = step.epochs,
                          .steps = step.steps,
                          .batch_size = step.batch_size,
                          .final_learning_rate = step.final_rate,
                          .schedule = step.schedule,
                          .seed = seed,
                          .pools = pools};
  const int64_t num_epochs = options.num_epochs(num_windows);
  const auto begin_epoch = [&](int64_t epoch) {
    for (const Parameter& parameter : parameters) {
      if (parameter.begin_epoch) parameter.begin_epoch(epoch, num_epochs);
    }
  };
  options.on_epoch = [&](int64_t epoch, double value) {
    begin_epoch(epoch);
    tell(EpochLearned{place, step.name, epoch, num_epochs, value});
  };
  begin_epoch(0);
  const OptimizeResult result = optimize_block(loss, monitored, num_windows, groups, options);
  const std::string where = (place == kWholeModel ? "the model" : "block " + std::to_string(place)) + ", " + step.name;
  if (result.stopped_at_nonfinite) {
    tell(Warning{where + ": the loss became NaN or infinite; learning of this stage stopped and the best state so "
                         "far is kept"});
  } else if (result.best_epoch == 0) {
    tell(Warning{where + ": no epoch lowered the loss; the starting state is kept"});
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  tell(StageLearned{place, step.name, result.loss_before, result.loss_after, seconds});
  return result;
}

Tensor countable_windows(const Tensor& token_weights) {
  return token_weights.ne(0).all(1).nonzero().flatten().to(at::kCPU);
}

}  // namespace baseq
