#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>

#include "block_optimizer.h"
#include "candidate.h"
#include "steps.h"

namespace baseq {
namespace {

/// Windows of which every token counts: one that does not would make the loss of its window NaN.
Tensor countable_windows(const Tensor& token_weights) {
  return token_weights.ne(0).all(1).nonzero().flatten().to(at::kCPU);
}

/// The weighted squared error of the block's output over windows.
class Objective {
 public:
  Objective(const LearnStep& step, const BlockTask& task)
      : task_(task),
        stream_(task.stream(step.stream)),
        windows_(countable_windows(task.token_weights)),
        num_monitored_(std::min(step.num_monitored, num_windows())) {}

  int64_t num_windows() const { return windows_.size(0); }

  /// @param chosen numbers of windows, int64
  Tensor loss(const DecoderLayer& layer, const Tensor& chosen) const {
    task_.inputs.pass.step();
    const Tensor indices = windows_.index_select(0, chosen);
    const at::TensorOptions compute = task_.inputs.compute();
    const Tensor there = indices.to(compute.device());
    const auto rows = [&](const Tensor& of) { return of.index_select(0, of.is_cpu() ? indices : there).to(compute); };
    const Tensor x = rows(stream_), target = rows(task_.target), weights = rows(task_.token_weights);
    const Tensor error = (layer.forward(x, task_.inputs.rope) - target).square().mean(-1);
    return (error * weights).mean();
  }
  /// Over windows that are spread over all of them.
  double monitored(const DecoderLayer& layer) const {
    Tensor sum = at::zeros({}, task_.inputs.compute().dtype(at::kDouble));
    for (int64_t i = 0; i < num_monitored_; ++i) {
      sum.add_(loss(layer, at::tensor({i * num_windows() / num_monitored_}, at::kLong)));
    }
    return sum.item<double>() / static_cast<double>(num_monitored_);
  }

 private:
  const BlockTask& task_;
  const Tensor& stream_;
  Tensor windows_;  ///< that count
  int64_t num_monitored_;
};

void tell_result(const OptimizeResult& result, const LearnStep& step, const BlockTask& task, double seconds) {
  const std::string where = "block " + std::to_string(task.place.block) + ", " + step.name;
  if (result.stopped_at_nonfinite) {
    task.tell(Warning{where + ": the loss became NaN or infinite; learning of this stage stopped and the best state so "
                              "far is kept"});
  } else if (result.best_epoch == 0) {
    task.tell(Warning{where + ": no epoch lowered the loss; the starting state is kept"});
  }
  task.tell(StageLearned{task.place.block, step.name, result.loss_before, result.loss_after, seconds});
}

}  // namespace

void apply(const LearnStep& step, OpenBlock& block, const BlockTask& task) {
  const auto start = std::chrono::steady_clock::now();
  if (!step.learns()) return;
  const Objective objective(step, task);
  if (objective.num_windows() == 0) return;  // the run was told that no token counts
  Candidate candidate(step, block, task);
  if (candidate.parameters().empty()) return;
  std::vector<ParameterGroup> groups;
  for (const Parameter& parameter : candidate.parameters()) {
    groups.push_back({.parameters = parameter.leaves,
                      .learning_rate = parameter.rate,
                      .epsilon = parameter.epsilon,
                      .rule = step.rule,
                      .project = parameter.project});
  }
  OptimizeOptions options{.epochs = step.epochs,
                          .steps = step.steps,
                          .batch_size = step.batch_size,
                          .final_learning_rate = step.final_rate,
                          .schedule = step.schedule,
                          .seed = task.seed + static_cast<uint64_t>(task.place.block)};
  const int64_t num_epochs = options.num_epochs(objective.num_windows());
  options.on_epoch = [&](int64_t epoch, double loss) {
    candidate.begin_epoch(epoch, num_epochs);
    task.tell(EpochLearned{task.place.block, step.name, epoch, num_epochs, loss});
  };
  candidate.begin_epoch(0, num_epochs);
  const OptimizeResult result = optimize_block(
      [&](const Tensor& chosen) { return objective.loss(candidate.build(Candidate::Phase::kLearning), chosen); },
      [&] { return objective.monitored(candidate.build(Candidate::Phase::kMonitoring)); }, objective.num_windows(),
      groups, options);
  if (result.best_epoch > 0) {
    BlockState learned = candidate.result();
    if (candidate.reaches_weights()) {
      block.edit([&](BlockState& state) { state = std::move(learned); });
    } else {
      block.edit_points([&](BlockState& state) { state.points = std::move(learned.points); });
      block.forget_moments();
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  tell_result(result, step, task, seconds);
}

}  // namespace baseq
