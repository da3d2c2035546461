#include <ATen/ATen.h>

#include <algorithm>
#include <deque>
#include <utility>

#include "candidate.h"
#include "divided_loss.h"
#include "learning.h"
#include "steps.h"

namespace baseq {
namespace {

/// The error of the output of a token, [.., seq].
Tensor error_of(LearnStep::Loss loss, const Tensor& output, const Tensor& target) {
  const Tensor squared = (output - target).square().mean(-1);
  if (loss == LearnStep::Loss::kMse) return squared;
  const Tensor expected = target.log_softmax(-1);
  const Tensor divergence = (expected.exp() * (expected - output.log_softmax(-1))).sum(-1);
  return squared + divergence / static_cast<double>(output.size(-1));
}

/// The weighted error of the output of blocks over windows.
class Objective {
 public:
  using Layers = std::vector<DecoderLayer>;

  Objective(const LearnStep& step, const BlockTask& task)
      : task_(task),
        loss_(step.loss),
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
  Tensor loss(const Layers& layers, const Tensor& chosen) const {
    task_.inputs.pass.step();
    const Tensor indices = windows_.index_select(0, chosen) - shards_.first_window();
    const at::TensorOptions compute = task_.inputs.compute();
    const Tensor there = indices.to(compute.device());
    const auto rows = [&](const Tensor& of) { return of.index_select(0, of.is_cpu() ? indices : there).to(compute); };
    const Tensor target = rows(task_.target), weights = rows(task_.token_weights);
    Tensor hidden = rows(stream_);
    for (const DecoderLayer& layer : layers) hidden = layer.forward(hidden, task_.inputs.rope);
    return (error_of(loss_, hidden, target) * weights).mean();
  }
  /// Over windows that are spread over all of them.
  double monitored(const Layers& layers) const {
    WindowSum sum(shards_);
    for (int64_t i = 0; i < num_monitored_; ++i) {
      const int64_t chosen = i * num_windows() / num_monitored_;
      if (owner_of(chosen) != shards_.communicator().rank) continue;
      sum.add(windows_[chosen].item<int64_t>() - shards_.first_window(), loss(layers, at::tensor({chosen}, at::kLong)));
    }
    return sum.total().item<double>() / static_cast<double>(num_monitored_);
  }

 private:
  const BlockTask& task_;
  LearnStep::Loss loss_;
  const Tensor& stream_;
  const Shards& shards_;
  Tensor windows_;  ///< that count, of all processes
  int64_t num_monitored_;
};

/// Blocks as a function of the parameters that a step learns.
class OpenCandidates {
 public:
  OpenCandidates(const LearnStep& step, const std::vector<WindowBlock>& window) {
    for (const WindowBlock& open : window) {
      const Candidate& added = candidates_.emplace_back(step, open.block, open.task);
      parameters_.insert(parameters_.end(), added.parameters().begin(), added.parameters().end());
    }
  }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  void begin_step() {
    for (Candidate& candidate : candidates_) candidate.begin_step();
  }
  Objective::Layers build(Candidate::Phase phase) {
    Objective::Layers layers;
    for (Candidate& candidate : candidates_) layers.push_back(candidate.build(phase));
    return layers;
  }
  /// Gives each block its learned state.
  void settle(const std::vector<WindowBlock>& window) const {
    for (size_t i = 0; i < window.size(); ++i) settle(candidates_[i], window[i].block);
  }

 private:
  static void settle(const Candidate& candidate, OpenBlock& block) {
    BlockState learned = candidate.result();
    if (candidate.reaches_weights()) {
      block.edit([&](BlockState& state) { state = std::move(learned); });
    } else {
      block.edit_points([&](BlockState& state) { state.points = std::move(learned.points); });
      block.forget_moments();
    }
  }

  std::deque<Candidate> candidates_;
  std::vector<Parameter> parameters_;
};

}  // namespace

void apply(const LearnStep& step, OpenBlock& block, const BlockTask& task) { learn_together(step, {{block, task}}); }

void learn_together(const LearnStep& step, const std::vector<WindowBlock>& window) {
  if (!step.learns()) return;
  const BlockTask& task = window.front().task;
  const Objective objective(step, task);
  if (objective.num_windows() == 0) return;  // the run was told that no token counts
  OpenCandidates candidates(step, window);
  if (candidates.parameters().empty()) return;
  const Learning learning{.step = step,
                          .place = task.place.block,
                          .seed = task.seed + static_cast<uint64_t>(task.place.block),
                          .report = task.report,
                          .pools = objective.pools(step.batch_size)};
  const Shards& shards = task.inputs.pass.shards;
  const auto loss = [&](const Tensor& chosen) {
    candidates.begin_step();
    const Objective::Layers layers = candidates.build(Candidate::Phase::kLearning);
    const auto loss_of = [&](const Tensor& windows) { return objective.loss(layers, windows); };
    if (shards.num_shards() == 1) return loss_of(chosen);
    const auto owner_of = [&](int64_t chosen_window) { return objective.owner_of(chosen_window); };
    return divided_loss(shards.communicator(), candidates.parameters(), chosen, owner_of, loss_of);
  };
  const auto monitored = [&] { return objective.monitored(candidates.build(Candidate::Phase::kMonitoring)); };
  const OptimizeResult result = learning.run(candidates.parameters(), loss, monitored, objective.num_windows());
  if (result.best_epoch > 0) candidates.settle(window);
}

}  // namespace baseq
