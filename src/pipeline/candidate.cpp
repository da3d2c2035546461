#include "candidate.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "learned_codes.h"
#include "quant/cells.h"

namespace baseq {

using Weights = LearnStep::Weights;
using OfRounded = Parameter::OfRounded;

StraightThrough::StraightThrough(const QuantSpec& spec, const GptqOptions& options) : spec_(spec), options_(options) {
  // Coarser than where the codes are decided: the ratio is searched again and again while the weight moves.
  constexpr int64_t kSearchSteps = 20;
  options_.search.num_steps = std::min(options_.search.num_steps, kSearchSteps);
}

Tensor StraightThrough::forward(const Tensor& weight, const Tensor& clip, bool search) {
  if (!clip.defined() && (search || !ratio_.defined())) search_ratio(weight);
  return fake_quantize(weight, compute_qparams(weight, spec_, clip.defined() ? clip : ratio_), spec_);
}

void StraightThrough::search_ratio(const Tensor& weight) {
  const c10::NoGradGuard no_grad;
  const Tensor full = compute_qparams(weight, spec_).scale;
  const Tensor ratio =
      options_.mse_clip ? search_qparams(weight, spec_, options_.search).scale / full : at::ones_like(full);
  ratio_ = ratio.unsqueeze(-1);
}

Candidate::Candidate(const LearnStep& step, OpenBlock& block, const BlockTask& task)
    : step_(step),
      task_(task),
      state_(block.state()),
      transforms_(split_transforms(state_, task.place)),
      parameters_(make_parameters(step, state_, task.place, task.grids)) {
  const bool unrounded = has_codes(state_) && step.weights != Weights::kRounded;
  if (unrounded) {
    for (auto& [name, weight] : state_.weights) weight = {.clip = weight.clip};
  }
  for (const Parameter& parameter : parameters_) {
    const bool moves_none = parameter.reaches.empty() && !parameter.moves;
    TORCH_CHECK(step.weights != Weights::kRounded || moves_none || parameter.of_rounded != OfRounded::kNothing,
                "learn step \"", step.name, "\": ", parameter.name, " would change weights that are rounded");
    if (!moves_none) {
      original_ = block.original();
      reaches_weights_ = true;
    }
    for (const std::string& name : parameter.reaches) reach(name, parameter);
    if (parameter.on_activations) start_down_scale_ = merged_scale(Site::kDown, transforms_, task.place);
  }
  if (unrounded) {
    base_ = realize(block.original(), state_, task.place);
  } else {
    base_ = !reaches_weights_ ? block.layer() : block.release_layer();  // it is made again with what is learned
  }
  base_.for_each_linear([&](const std::string& name, Linear& linear) {
    linear.weight = reached_.contains(name) ? Tensor{} : linear.weight.to(step.products);
  });
}

void Candidate::reach(const std::string& name, const Parameter& parameter) {
  Reached& reached = reached_[name];
  reached.moves = reached.moves || parameter.moves;
  if (step_.weights == Weights::kStraightThrough) reached.rounding.emplace(*task_.grids.weights, task_.rounding);
  if (reached.moves) return;
  const bool known = reached.exact.weight.defined();
  if (!known) reached.exact = realize_linear(original_, name, transforms_, task_.place, at::kDouble);
  const auto it = state_.weights.find(name);
  if (parameter.of_rounded == OfRounded::kCodes) {
    reached.in_cells = nearest_in_cells(reached.exact.weight, *it->second.codes);
  }
  if (known) return;
  if (it == state_.weights.end() || !it->second.low_rank.defined() || !task_.rounding.mse_clip) return;
  const QuantizedWeight& codes = *it->second.codes;
  reached.feedback_clip =
      clip_of(reached.exact.weight - it->second.low_rank.product(), codes.spec, codes.qparams.scale);
}

void Candidate::begin_epoch(int64_t epoch, int64_t num_epochs) {
  for (const Parameter& parameter : parameters_) {
    if (parameter.begin_epoch) parameter.begin_epoch(epoch, num_epochs);
  }
}

DecoderLayer Candidate::build(Phase phase) {
  BlockState current = state_;
  for (const Parameter& parameter : parameters_) parameter.write(current);
  DecoderLayer layer = base_;
  if (!reaches_weights_) {
    realize_points(layer, transforms_, current, task_.place);
    return layer;
  }
  const SplitTransforms transforms = split_transforms(current, task_.place);
  realize_sites(layer, original_, transforms, current, task_.place);
  SplitTransforms of_writers = transforms;
  if (start_down_scale_.defined()) {
    // The rows of up_proj keep the scale at which the step began. A scale of rows commutes with their rounding, so what
    // is learned can stand on the activations.
    layer.mlp.down_scale = merged_scale(Site::kDown, transforms, task_.place) / start_down_scale_;
    of_writers.at(Site::kDown) = transforms_.at(Site::kDown);
  }
  // As often as the published method searches its clip again. States are compared with the clip that suits each.
  constexpr int64_t kStepsPerSearch = 10;
  const bool search = phase == Phase::kMonitoring || steps_++ % kStepsPerSearch == 0;
  for (auto& [name, reached] : reached_) {
    Linear& linear = layer.linear(name);
    const SplitTransforms& seen = input_site(name) == Site::kGateUp ? of_writers : transforms;
    linear = reached.moves ? realize_linear(original_, name, seen, task_.place, at::kFloat) : reached.exact;
    linear.weight = weight_of(name, reached, linear.weight, current, search).to(step_.products);
  }
  return layer;
}

Tensor Candidate::weight_of(const std::string& name, Reached& reached, const Tensor& exact, const BlockState& current,
                            bool search) const {
  if (step_.weights == Weights::kExact) return exact;
  const auto it = current.weights.find(name);
  if (step_.weights == Weights::kStraightThrough) {
    return reached.rounding->forward(exact, it == current.weights.end() ? Tensor{} : it->second.clip, search);
  }
  const LowRankFactors& factors = it->second.low_rank;
  if (!factors.defined() || !factors.A.requires_grad()) return learned_weight(reached.in_cells, it->second);
  return feedback_weight(exact, factors.A, factors.B, *task_.grids.weights,
                         state_.weights.at(name).low_rank.A.scalar_type(), reached.feedback_clip);
}

BlockState Candidate::result() const {
  const c10::NoGradGuard no_grad;
  BlockState state = state_;
  for (const Parameter& parameter : parameters_) parameter.write(state);
  for (auto& [site, transform] : state.transforms) {
    for (Factor& factor : transform) factor = factor.detach();
  }
  for (auto& [site, point] : state.points) {
    for (Tensor* tensor : {&point.clip, &point.shift, &point.gain}) {
      if (tensor->defined()) *tensor = tensor->detach().clone();
    }
  }
  for (auto& [name, weight] : state.weights) {
    if (step_.weights == Weights::kRounded && reached_.contains(name)) settle(weight, reached_.at(name).in_cells);
    if (!weight.low_rank.A.defined() || !weight.low_rank.A.requires_grad()) continue;
    const Reached& reached = reached_.at(name);
    const at::ScalarType dtype = state_.weights.at(name).low_rank.A.scalar_type();
    weight.low_rank = store_factors(weight.low_rank.A.detach(), weight.low_rank.B.detach(), dtype);
    weight.codes = round_beside(reached.exact.weight, weight.low_rank, *task_.grids.weights, reached.feedback_clip);
  }
  return state;
}

}  // namespace baseq
