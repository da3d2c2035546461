#include "parameters.h"

#include <ATen/ATen.h>

#include <cmath>
#include <set>
#include <utility>

#include "baseq/model/model.h"
#include "transform_parameters.h"

namespace baseq {
namespace {

/// Clips are learned through a sigmoid; a start at exactly 1 would have no gradient.
constexpr double kLargestClip = 0.999;
/// Where learned clips of weights start, sigmoid(4) as in OmniQuant (arXiv 2308.13137).
constexpr double kWeightClip = 0.982;
/// The gradient of an element of a low-rank factor shrinks with the size of the weight.
constexpr double kLowRankEpsilon = 1e-15;

Tensor leaf(const Tensor& value) { return value.detach().clone().requires_grad_(true); }

/// The rates of a step by parameter.
class Rates {
 public:
  explicit Rates(const std::map<std::string, double>& rates) : rates_(rates) {}

  /// An exact name counts before a "*"; absent: the parameter is not learned.
  std::optional<double> of(const std::string& place, const std::string& what) {
    for (const std::string& key : {place + "." + what, "*." + what}) {
      const auto it = rates_.find(key);
      if (it == rates_.end()) continue;
      used_.insert(key);
      return it->second;
    }
    return std::nullopt;
  }
  void check_all_used(const std::string& step) const {
    for (const auto& [key, rate] : rates_) {
      TORCH_CHECK(used_.contains(key), "learn step \"", step, "\": the rate \"", key, "\" names nothing that there is");
    }
  }

 private:
  const std::map<std::string, double>& rates_;
  std::set<std::string> used_;
};

Parameter clip_parameter(Site site, const QuantPoint& point) {
  const Tensor logit = leaf(at::logit(point.clip.clamp_max(kLargestClip)));
  return {.leaves = {logit},
          .write = [site, logit](BlockState& state) { state.points.at(site).clip = at::sigmoid(logit); }};
}

/// A shift or a gain, which is learned as it is.
Parameter vector_parameter(Site site, Tensor QuantPoint::*member, const Tensor& start) {
  const Tensor value = leaf(start);
  return {.leaves = {value},
          .write = [site, member, value](BlockState& state) { state.points.at(site).*member = value; }};
}

Parameter weight_clip_parameter(const LinearShape& linear, const BlockState& state, const QuantSpec& spec,
                                const at::TensorOptions& options) {
  const int64_t rows = spec.strategy == Strategy::kTensor ? 1 : linear.out_features;
  const int64_t groups = spec.strategy == Strategy::kGroup ? linear.in_features / spec.group_size : 1;
  const auto it = state.weights.find(linear.name);
  const bool known = it != state.weights.end() && it->second.clip.defined();
  const Tensor start = known ? it->second.clip : at::full({rows, groups, 1}, kWeightClip, options);
  const Tensor logit = leaf(at::logit(start.clamp_max(kLargestClip)));
  const std::string name = linear.name;
  return {.leaves = {logit},
          .write = [name, logit](BlockState& to) { to.weights[name].clip = at::sigmoid(logit); },
          .reaches = {linear.name}};
}

/// Its rate is in units of the root mean square of A.
Parameter low_rank_parameter(const char* name, const LowRankFactors& factors) {
  const Tensor a = leaf(factors.dequantized_A()), b = leaf(factors.dequantized_B());
  return {.leaves = {a, b},
          .rate = std::sqrt(a.detach().square().mean().item<double>()),
          .epsilon = kLowRankEpsilon,
          .write = [name = std::string(name), a,
                    b](BlockState& state) { state.weights.at(name).low_rank = {.A = a, .B = b}; },
          .reaches = {name}};
}

/// What the rates name of the transform at a site.
template <class Add>
void add_transforms(const SiteInfo& info, BlockState& state, const std::string& name, const Add& add) {
  std::map<Factor::Kind, std::string_view> moved;
  for (const TransformLeaf& leaf : transform_leaves()) {
    // RoPE passes no other scales than those that are equal within each pair.
    if (info.site == Site::kQueryKey && leaf.kind == Factor::Kind::kScale) continue;
    const Factor* factor = find_factor(state, info.site, leaf.kind);
    if (factor == nullptr) continue;
    add(name, std::string(leaf.what), [&] {
      const auto [other, is_first] = moved.emplace(leaf.kind, leaf.what);
      TORCH_CHECK(is_first, "learn: \"", std::string(other->second), "\" and \"", std::string(leaf.what),
                  "\" move the same factor at ", name);
      return leaf.make(info.site, *factor);
    });
  }
}

}  // namespace

std::vector<Parameter> make_parameters(const LearnStep& step, const BlockState& from, const BlockPlace& place,
                                       const Grids& grids) {
  std::vector<Parameter> parameters;
  Rates rates(step.rates);
  BlockState state = from;
  const auto add = [&](const std::string& where, const std::string& what, const auto& make) {
    const std::optional<double> rate = rates.of(where, what);
    if (!rate) return;
    Parameter parameter = make();
    parameter.name = where + "." + what;
    parameter.rate *= *rate;
    parameters.push_back(std::move(parameter));
  };
  for (const SiteInfo& info : sites()) {
    const std::string name(info.name);
    add_transforms(info, state, name, add);
    const auto it = state.points.find(info.site);
    if (it == state.points.end()) continue;
    const QuantPoint& point = it->second;
    const std::string where = point_name(info.site);
    add(where, "clip", [&] { return clip_parameter(info.site, point); });
    if (point.shift.defined()) {
      add(where, "shift", [&] { return vector_parameter(info.site, &QuantPoint::shift, point.shift); });
    }
    if (info.cache) continue;
    add(where, "gain", [&] {
      const int64_t features = site_shape(info.site, place.config).features;
      return vector_parameter(info.site, &QuantPoint::gain,
                              point.gain.defined() ? point.gain : at::ones({features}, place.compute));
    });
  }
  for (const LinearShape& linear : linear_shapes(place.config)) {
    if (grids.weights) {
      add(linear.name, "weight_clip",
          [&] { return weight_clip_parameter(linear, state, *grids.weights, place.compute); });
    }
    const auto it = state.weights.find(linear.name);
    if (it == state.weights.end() || !it->second.low_rank.defined()) continue;
    add(linear.name, "low_rank", [&] { return low_rank_parameter(linear.name, it->second.low_rank); });
  }
  rates.check_all_used(step.name);
  return parameters;
}

}  // namespace baseq
