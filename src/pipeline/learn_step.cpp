#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "candidate.h"
#include "divided_loss.h"
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
        shards_(task.inputs.pass.shards),
        windows_(countable_windows(shards_.all(task.token_weights))),
        num_monitored_(std::min(step.num_monitored, num_windows())) {}

  int64_t num_windows() const { return windows_.size(0); }
  /// See OptimizeOptions.
  std::vector<int64_t> pools(int64_t batch_size) const { return shards_.pools(windows_, batch_size); }
  /// The process that has a window.
  int64_t owner_of(int64_t chosen) const { return shards_.owner_of(windows_[chosen].item<int64_t>()); }

  /// @param chosen numbers of windows of this process, int64
  Tensor loss(const DecoderLayer& layer, const Tensor& chosen) const {
    task_.inputs.pass.step();
    const Tensor indices = windows_.index_select(0, chosen) - shards_.first_window();
    const at::TensorOptions compute = task_.inputs.compute();
    const Tensor there = indices.to(compute.device());
    const auto rows = [&](const Tensor& of) { return of.index_select(0, of.is_cpu() ? indices : there).to(compute); };
    const Tensor x = rows(stream_), target = rows(task_.target), weights = rows(task_.token_weights);
    const Tensor error = (layer.forward(x, task_.inputs.rope) - target).square().mean(-1);
    return (error * weights).mean();
  }
  /// Over windows that are spread over all of them.
  double monitored(const DecoderLayer& layer) const {
    WindowSum sum(shards_);
    for (int64_t i = 0; i < num_monitored_; ++i) {
      const int64_t chosen = i * num_windows() / num_monitored_;
      if (owner_of(chosen) != shards_.communicator().rank) continue;
      sum.add(windows_[chosen].item<int64_t>() - shards_.first_window(), loss(layer, at::tensor({chosen}, at::kLong)));
    }
    return sum.total().item<double>() / static_cast<double>(num_monitored_);
  }

 private:
  const BlockTask& task_;
  const Tensor& stream_;
  const Shards& shards_;
  Tensor windows_;  ///< that count, of all processes
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
                          .report = task.report,
                          .pools = objective.pools(step.batch_size)};
  const Shards& shards = task.inputs.pass.shards;
  const auto loss = [&](const Tensor& chosen) {
    candidate.begin_step();
    const DecoderLayer layer = candidate.build(Candidate::Phase::kLearning);
    const auto loss_of = [&](const Tensor& windows) { return objective.loss(layer, windows); };
    if (shards.num_shards() == 1) return loss_of(chosen);
    const auto owner_of = [&](int64_t window) { return objective.owner_of(window); };
    return divided_loss(shards.communicator(), candidate.parameters(), chosen, owner_of, loss_of);
  };
  const OptimizeResult result = learning.run(
      candidate.parameters(), loss, [&] { return objective.monitored(candidate.build(Candidate::Phase::kMonitoring)); },
      objective.num_windows());
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
