#include "model_step.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <deque>
#include <optional>

#include "candidate.h"
#include "cayley_sgd.h"
#include "divided_loss.h"
#include "learning.h"
#include "recompute.h"

namespace baseq {
namespace {

constexpr const char *kFinalNorm = "final.norm", *kResidualMatrix = "residual.matrix";

/// What of a step concerns single blocks.
LearnStep of_blocks_alone(LearnStep step) {
  step.rates.erase(kFinalNorm);
  step.rates.erase(kResidualMatrix);
  return step;
}

std::optional<double> rate_of(const LearnStep& step, const char* name, const char* any) {
  auto rate = step.rates.find(name);
  if (rate == step.rates.end()) rate = step.rates.find(any);
  return rate == step.rates.end() ? std::nullopt : std::optional(rate->second);
}

/// The matrix of the residual stream. RMSNorm without gain commutes with it, and what it does to exact writers and to
/// the stream cancels: left are the inputs after the norms and their readers, so it is learned as a factor there, in
/// the basis of the checkpoint.
class ResidualMatrix {
 public:
  ResidualMatrix(const LearnStep& step, const ModelState& state, const ModelTask& task) : task_(task) {
    const std::optional<double> rate = rate_of(step, kResidualMatrix, "*.matrix");
    const auto is_matrix = [](const Factor& factor) { return factor.kind == Factor::Kind::kMatrix; };
    if (!rate || !task.residual || std::ranges::none_of(task.residual(state.residual), is_matrix)) return;
    const int64_t n = task.config.hidden_size;
    matrix_ = state.residual.defined() ? state.residual.to(task.inputs.compute()) : at::eye(n, task.inputs.compute());
    matrix_ = matrix_.clone().requires_grad_(true);
    Parameter parameter{.name = kResidualMatrix,
                        .leaves = {matrix_},
                        .rate = *rate,
                        .write = [this](BlockState& block) { write(block); },
                        .orthogonal = true,
                        .moves = true,
                        .of_model = true};
    for (const Site site : kSites) {
      const SiteInfo& info = site_info(site);
      parameter.reaches.insert(parameter.reaches.end(), info.readers.begin(), info.readers.end());
    }
    parameters_.push_back(std::move(parameter));
  }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  bool is_learned() const { return !parameters_.empty(); }
  /// What steps in float32 drifted is taken back.
  Tensor result() const { return nearest_orthogonal(matrix_.detach()); }

 private:
  static constexpr Site kSites[] = {Site::kQkv, Site::kGateUp};

  void write(BlockState& block) const {
    const Transform residual = task_.residual(matrix_);
    for (const Site site : kSites) {
      Transform& transform = block.transforms[site];
      transform.insert(transform.begin(), residual.begin(), residual.end());
    }
  }

  const ModelTask& task_;
  Tensor matrix_;
  std::vector<Parameter> parameters_;
};

/// The blocks of a model as a function of the parameters that a step learns.
class Candidates {
 public:
  Candidates(const LearnStep& step, const std::vector<BlockState>& states, const ModelTask& task,
             const std::vector<Parameter>& shared) {
    const auto& read = shared.empty() ? task.read_original : task.read_fused;
    for (int64_t b = 0; b < static_cast<int64_t>(states.size()); ++b) {
      task.inputs.pass.step();
      tasks_.push_back({.place = {task.config, b, task.inputs.compute()},
                        .grids = grids_.emplace_back(task.grids.in_block(b)),
                        .rounding = task.rounding,
                        .inputs = task.inputs});
      OpenBlock block(states[static_cast<size_t>(b)], tasks_.back().place, [&read, b] { return read(b); });
      candidates_.emplace_back(step, block, tasks_.back(), Candidate::Holds::kCodes, shared);
      for (const Parameter& parameter : candidates_.back().parameters()) {
        if (!parameter.of_model) parameters_.push_back(parameter);
      }
    }
  }

  const std::vector<Parameter>& parameters() const { return parameters_; }
  BlockChain chain(bool monitoring, const BlockInputs& inputs) {
    using Phase = Candidate::Phase;
    return {.num_blocks = static_cast<int64_t>(candidates_.size()),
            .build =
                [this, monitoring](int64_t block, bool again) {
                  const Phase phase = monitoring ? Phase::kMonitoring : again ? Phase::kAgain : Phase::kLearning;
                  return candidates_[static_cast<size_t>(block)].build(phase);
                },
            .rope = inputs.rope,
            .before_block = inputs.pass.before_step};
  }
  /// Around each step of the optimizer, also where this process has none of its windows: all go on alike.
  void begin_step() {
    for (Candidate& candidate : candidates_) candidate.begin_step();
  }
  void end_step() {
    const c10::NoGradGuard no_grad;
    for (Candidate& candidate : candidates_) {
      if (candidate.search_is_due()) candidate.build(Candidate::Phase::kLearning);
    }
  }
  std::vector<BlockState> results() const {
    std::vector<BlockState> states;
    for (const Candidate& candidate : candidates_) states.push_back(candidate.result());
    return states;
  }

 private:
  std::deque<Grids> grids_;      // tasks refer to them
  std::deque<BlockTask> tasks_;  // candidates refer to them
  std::deque<Candidate> candidates_;
  std::vector<Parameter> parameters_;
};

/// The loss at the head over windows, which are learned from or monitored.
class ModelObjective {
 public:
  /// @param rotated whether the stream has the transform of the residual, as the student's head expects
  ModelObjective(const LearnStep& step, const ModelState& state, const ModelTask& task, bool rotated)
      : task_(task),
        shards_(task.inputs.pass.shards),
        rotated_(rotated),
        heads_(task.heads(step.products)),
        loss_(step.loss, step.top_k, heads_.student, heads_.teacher) {
    if (!rotated) heads_.student = heads_.teacher;
    heads_.student.norm_factor = state.final_norm;
    const Tensor countable = countable_windows(shards_.all(task.target.isfinite().all(-1)));
    const int64_t total = countable.size(0), held_out = std::min(step.num_monitored, std::max<int64_t>(total - 1, 0));
    std::vector<int64_t> learned, monitored;
    for (int64_t i = 0; i < total; ++i) {
      // Spread over all of them: the last of every n-th part.
      const bool hold = (i + 1) * held_out / total > i * held_out / total;
      (hold ? monitored : learned).push_back(countable[i].item<int64_t>());
    }
    learned_ = at::tensor(learned, at::kLong);
    monitored_ = held_out > 0 ? at::tensor(monitored, at::kLong) : learned_;
  }

  /// The factor of the final norm, where the step names it.
  std::vector<Parameter> parameters(const LearnStep& step) {
    const std::optional<double> rate = rate_of(step, kFinalNorm, "*.norm");
    if (!rate) return {};
    Tensor& factor = heads_.student.norm_factor;
    factor = (factor.defined() ? factor.detach().clone() : at::ones_like(heads_.student.norm.weight));
    factor.requires_grad_(true);
    return {{.name = kFinalNorm, .leaves = {factor}, .rate = *rate}};
  }
  Tensor final_norm() const {
    const Tensor& factor = heads_.student.norm_factor;
    return factor.defined() ? factor.detach().clone() : factor;
  }

  int64_t num_learned() const { return learned_.size(0); }
  /// The process that has a window from which is learned.
  int64_t owner_of(int64_t chosen) const { return shards_.owner_of(learned_[chosen].item<int64_t>()); }
  /// See OptimizeOptions.
  std::vector<int64_t> pools(int64_t batch_size) const { return shards_.pools(learned_, batch_size); }

  /// Adds the gradients to the leaves itself; the value has a graph only so that its backward() is allowed.
  Tensor loss(const BlockChain& chain, const Tensor& chosen) const {
    const Batch batch = batch_of(learned_.index_select(0, chosen));
    const double value = chain.backward(batch.x, [&](const Tensor& hidden) {
      const HeadLoss::Value at_end = loss_.with_gradient(hidden.flatten(0, 1), batch.target, batch.next);
      return BlockChain::AtEnd{at_end.loss, at_end.gradient.view(hidden.sizes())};
    });
    return at::scalar_tensor(value, at::kDouble).requires_grad_(true);
  }
  double monitored(const BlockChain& chain) const {
    WindowSum sum(shards_);
    bool has_window = false;
    for (int64_t i = 0; i < monitored_.size(0); ++i) {
      const auto window = monitored_[i].item<int64_t>();
      if (shards_.owner_of(window) != shards_.communicator().rank) continue;
      has_window = true;
      const Batch batch = batch_of(monitored_.narrow(0, i, 1));
      const double value = loss_.value(chain.forward(batch.x).flatten(0, 1), batch.target, batch.next);
      sum.add(window - shards_.first_window(), at::scalar_tensor(value, at::kDouble));
    }
    // Clips are searched anew for each state that is monitored, also where this process has none of the windows.
    for (int64_t block = 0; block < chain.num_blocks && !has_window; ++block) chain.build(block, /*again=*/false);
    return sum.total().item<double>() / static_cast<double>(monitored_.size(0));
  }

 private:
  struct Batch {
    Tensor x;             ///< [windows, seq, hidden_size]
    Tensor target, next;  ///< by row
  };
  /// @param windows of this process, by their numbers among all
  Batch batch_of(const Tensor& windows) const {
    const Tensor indices = windows - shards_.first_window();
    const at::TensorOptions compute = task_.inputs.compute();
    const Tensor ids = task_.windows.index_select(0, indices).to(compute.device(), at::kLong);
    const Tensor next = at::constant_pad_nd(ids.narrow(1, 1, ids.size(1) - 1), {0, 1}, -1);
    const auto rows = [&](const Tensor& stream) {
      return stream.index_select(0, indices.to(stream.device())).to(compute);
    };
    Tensor x = rows(task_.inputs.quantized);
    if (!rotated_) x = apply_transpose(task_.residual({}), x);
    return {x, rows(task_.target).flatten(0, 1), next.flatten()};
  }

  const ModelTask& task_;
  const Shards& shards_;
  bool rotated_;
  Heads heads_;
  HeadLoss loss_;
  Tensor learned_, monitored_;  ///< numbers of windows among those of all processes, int64
};

}  // namespace

void apply(const LearnStep& step, ModelState& state, const ModelTask& task) {
  if (!step.learns()) return;
  const ResidualMatrix residual(step, state, task);
  ModelObjective objective(step, state, task, !residual.is_learned());
  if (objective.num_learned() == 0) return;  // the run was told that no token counts
  const LearnStep of_blocks = of_blocks_alone(step);
  Candidates candidates(of_blocks, state.blocks, task, residual.parameters());
  std::vector<Parameter> parameters = objective.parameters(step);
  parameters.insert(parameters.end(), residual.parameters().begin(), residual.parameters().end());
  parameters.insert(parameters.end(), candidates.parameters().begin(), candidates.parameters().end());
  if (parameters.empty()) return;
  const Learning learning{.step = step,
                          .place = kWholeModel,
                          .seed = task.seed,
                          .report = task.report,
                          .pools = objective.pools(step.batch_size)};
  const BlockChain learned = candidates.chain(/*monitoring=*/false, task.inputs),
                   monitored = candidates.chain(/*monitoring=*/true, task.inputs);
  const Shards& shards = task.inputs.pass.shards;
  const auto loss_of = [&](const Tensor& chosen) { return objective.loss(learned, chosen); };
  const auto loss = [&](const Tensor& chosen) {
    candidates.begin_step();
    if (shards.num_shards() == 1) return loss_of(chosen);
    const auto owner_of = [&](int64_t window) { return objective.owner_of(window); };
    const Tensor value = divided_loss(shards.communicator(), parameters, chosen, owner_of, loss_of);
    candidates.end_step();
    return value;
  };
  const OptimizeResult result = learning.run(
      parameters, loss, [&] { return objective.monitored(monitored); }, objective.num_learned());
  if (result.best_epoch == 0) return;
  state.blocks = candidates.results();
  state.final_norm = objective.final_norm();
  if (residual.is_learned()) state.residual = residual.result();
}

}  // namespace baseq
