#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "candidate.h"
#include "learning.h"
#include "steps.h"

namespace baseq {
namespace {

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

}  // namespace

void apply(const LearnStep& step, OpenBlock& block, const BlockTask& task) {
  if (!step.learns()) return;
  const Objective objective(step, task);
  if (objective.num_windows() == 0) return;  // the run was told that no token counts
  Candidate candidate(step, block, task);
  if (candidate.parameters().empty()) return;
  const Learning learning{.step = step,
                          .place = task.place.block,
                          .seed = task.seed + static_cast<uint64_t>(task.place.block),
                          .report = task.report};
  const OptimizeResult result = learning.run(
      candidate.parameters(),
      [&](const Tensor& chosen) { return objective.loss(candidate.build(Candidate::Phase::kLearning), chosen); },
      [&] { return objective.monitored(candidate.build(Candidate::Phase::kMonitoring)); }, objective.num_windows());
  if (result.best_epoch == 0) return;
  BlockState learned = candidate.result();
  if (candidate.reaches_weights()) {
    block.edit([&](BlockState& state) { state = std::move(learned); });
  } else {
    block.edit_points([&](BlockState& state) { state.points = std::move(learned.points); });
    block.forget_moments();
  }
}

}  // namespace baseq
