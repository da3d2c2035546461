#include "candidate.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

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

Candidate::Candidate(const LearnStep& step, OpenBlock& block, const BlockTask& task, Holds holds,
                     const std::vector<Parameter>& shared)
    : step_(step),
      task_(task),
      state_(block.state()),
      transforms_(split_transforms(state_, task.place)),
      parameters_(make_parameters(step, state_, task.place, task.grids, task.seed)) {
  parameters_.insert(parameters_.end(), shared.begin(), shared.end());
  const bool unrounded = has_codes(state_) && step.weights != Weights::kRounded;
  if (unrounded) {
    for (auto& [name, weight] : state_.weights) weight = weight.unrounded();
  }
  for (const Parameter& parameter : parameters_) {
    const bool moves_none = parameter.reaches.empty() && !parameter.moves;
    TORCH_CHECK(step.weights != Weights::kRounded || moves_none || parameter.of_rounded != OfRounded::kNothing,
                "learn step \"", step.name, "\": ", parameter.name, " would change weights that are rounded");
    changes_weights_ = changes_weights_ || !moves_none;
    if (parameter.of_rounded == OfRounded::kGrid) {
      from_codes_.insert(parameter.reaches.begin(), parameter.reaches.end());
      continue;
    }
    changes_sites_ = changes_sites_ || parameter.on_norm || !moves_none;
    if (!moves_none) original_ = block.original();
    for (const std::string& name : parameter.reaches) reach(name, parameter);
    if (parameter.on_activations) start_down_scale_ = merged_scale(Site::kDown, transforms_, task.place);
  }
  if (changes_sites_ && reached_.empty()) {
    original_ = block.original();
    original_.for_each_linear([](const std::string&, Linear& linear) { linear = {}; });
  }
  if (unrounded) {
    hold(realize(block.original(), state_, task.place), holds);
  } else {
    hold(reaches_weights() ? block.release_layer() : block.layer(), holds);  // it is made again with what is learned
  }
}

void Candidate::hold(DecoderLayer layer, Holds holds) {
  base_ = std::move(layer);
  base_.for_each_linear([&](const std::string& name, Linear& linear) {
    if (holds == Holds::kCodes && linear.quantized) from_codes_.insert(name);
    if (reached_.contains(name)) from_codes_.erase(name);
    const bool made_anew = reached_.contains(name) || from_codes_.contains(name);
    linear.weight = made_anew ? Tensor{} : linear.weight.to(step_.products);
  });
}

void Candidate::reach(const std::string& name, const Parameter& parameter) {
  Reached& reached = reached_[name];
  reached.moves = reached.moves || parameter.moves;
  if (step_.weights == Weights::kStraightThrough) {
    if (const auto& grid = task_.grids.weights_of(name)) reached.rounding.emplace(*grid, task_.rounding);
  }
  if (reached.moves) return;
  const bool known = reached.exact.weight.defined();
  if (!known) reached.exact = realize_linear(original_, name, transforms_, task_.place, at::kDouble);
  const auto it = state_.weights.find(name);
  if (parameter.of_rounded == OfRounded::kCodes) {
    reached.in_cells = nearest_in_cells(it->second.before_rounding(reached.exact.weight), *it->second.codes);
  }
  if (known) return;
  if (it == state_.weights.end() || !it->second.low_rank.defined() || !task_.rounding.mse_clip) return;
  const QuantizedWeight& codes = *it->second.codes;
  reached.feedback_clip = clip_of(it->second.before_rounding(reached.exact.weight) - it->second.low_rank.product(),
                                  codes.spec, codes.qparams.scale);
}

void Candidate::begin_step() {
  constexpr int64_t kStepsPerSearch = 10;
  search_is_due_ = steps_++ % kStepsPerSearch == 0 && changes_sites_;
}

DecoderLayer Candidate::build(Phase phase) {
  BlockState current = state_;
  for (const Parameter& parameter : parameters_) parameter.write(current);
  DecoderLayer layer = base_;
  for (const std::string& name : from_codes_) {
    Linear& linear = layer.linear(name);
    round_linear(linear, current.weights.at(name), task_.place);
    linear.weight = linear.weight.to(step_.products);
  }
  if (!changes_sites_) {
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
  const bool search =
      phase == Phase::kMonitoring || (phase == Phase::kLearning && std::exchange(search_is_due_, false));
  for (auto& [name, reached] : reached_) {
    Linear& linear = layer.linear(name);
    const SplitTransforms& seen = input_site(name) == Site::kGateUp ? of_writers : transforms;
    linear = reached.moves ? realize_linear(original_, name, seen, task_.place, at::kFloat) : reached.exact;
    const Tensor before = current.weights[name].before_rounding(linear.weight);
    linear.weight = weight_of(name, reached, before, current, search).to(step_.products);
  }
  return layer;
}

Tensor Candidate::weight_of(const std::string& name, Reached& reached, const Tensor& exact, const BlockState& current,
                            bool search) const {
  if (step_.weights == Weights::kExact) return exact;
  const auto it = current.weights.find(name);
  if (step_.weights == Weights::kStraightThrough) {
    if (!reached.rounding) return exact;
    const Tensor rounded = reached.rounding->forward(exact, it->second.clip, search);
    const auto columns = static_cast<int64_t>(step_.rounded_share * static_cast<double>(exact.size(1)));
    if (columns == exact.size(1)) return rounded;
    return at::cat({rounded.narrow(1, 0, columns), exact.narrow(1, columns, exact.size(1) - columns)}, 1);
  }
  const LowRankFactors& factors = it->second.low_rank;
  if (!factors.defined() || !factors.A.requires_grad()) return learned_weight(reached.in_cells, it->second);
  const WeightState& start = state_.weights.at(name);
  return feedback_weight(exact, factors.A, factors.B, start.codes->spec, start.low_rank.A.scalar_type(),
                         reached.feedback_clip);
}

BlockState Candidate::result() const {
  const c10::NoGradGuard no_grad;
  BlockState state = state_;
  for (const Parameter& parameter : parameters_) {
    if (!parameter.of_model) parameter.write(state);
  }
  for (auto& [site, transform] : state.transforms) {
    for (Factor& factor : transform) factor = factor.detach();
  }
  for (auto& [site, point] : state.points) {
    for (Tensor* tensor : {&point.clip, &point.shift, &point.gain}) {
      if (tensor->defined()) *tensor = tensor->detach().clone();
    }
  }
  for (auto& [site, factor] : state.norms) factor = factor.detach().clone();
  for (auto& [name, weight] : state.weights) {
    const auto found = reached_.find(name);
    const Tensor in_cells = found == reached_.end() ? Tensor{} : found->second.in_cells;
    if (step_.weights == Weights::kRounded && weight.codes) settle(weight, in_cells);
    if (weight.added.defined()) weight.added = {.A = weight.added.A.detach(), .B = weight.added.B.detach()};
    if (!weight.low_rank.A.defined() || !weight.low_rank.A.requires_grad()) continue;
    const Reached& reached = reached_.at(name);
    const at::ScalarType dtype = state_.weights.at(name).low_rank.A.scalar_type();
    weight.low_rank = store_factors(weight.low_rank.A.detach(), weight.low_rank.B.detach(), dtype);
    weight.codes = round_beside(weight.before_rounding(reached.exact.weight), weight.low_rank, weight.codes->spec,
                                reached.feedback_clip);
  }
  return state;
}

}  // namespace baseq
