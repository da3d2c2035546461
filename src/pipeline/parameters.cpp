#include "parameters.h"

#include <ATen/ATen.h>

#include <cmath>
#include <set>
#include <utility>

#include "baseq/model/model.h"
#include "transform/random_rotation.h"
#include "transform_parameters.h"
#include "weight_parameters.h"

namespace baseq {
namespace {

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
  const Tensor logit = new_leaf(at::logit(point.clip.clamp_max(kLargestClip)));
  return {.leaves = {logit},
          .write = [site, logit](BlockState& state) { state.points.at(site).clip = at::sigmoid(logit); }};
}

/// A shift or a gain, which is learned as it is.
Parameter vector_parameter(Site site, Tensor QuantPoint::*member, const Tensor& start) {
  const Tensor value = new_leaf(start);
  return {.leaves = {value},
          .write = [site, member, value](BlockState& state) { state.points.at(site).*member = value; }};
}

Parameter norm_parameter(Site site, const BlockState& state, const BlockPlace& place) {
  const auto it = state.norms.find(site);
  const Tensor ones = at::ones({site_shape(site, place.config).features}, place.compute);
  const Tensor factor = new_leaf(it == state.norms.end() ? ones : it->second);
  return {.leaves = {factor}, .write = [site, factor](BlockState& to) { to.norms[site] = factor; }, .on_norm = true};
}

/// What rates name of the weight of a linear.
constexpr const char* kOfWeights[] = {"weight_clip",  "low_rank",          "weight_offset", "weight_value",
                                      "weight_scale", "weight_zero_point", "weight_lora"};

/// What the rates name of the transform at a site.
template <class Add>
void add_transforms(const SiteInfo& info, BlockState& state, const std::string& name, LearnStep::Rule rule,
                    const Add& add) {
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
      const bool by_cayley = rule == LearnStep::Rule::kCayley && leaf.what == "matrix";
      return by_cayley ? orthogonal_leaf(info.site, *factor) : leaf.make(info.site, *factor);
    });
  }
}

}  // namespace

Tensor new_leaf(const Tensor& value) { return value.detach().clone().requires_grad_(true); }

std::vector<Parameter> make_parameters(const LearnStep& step, const BlockState& from, const BlockPlace& place,
                                       const Grids& grids, uint64_t seed) {
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
    add_transforms(info, state, name, step.rule, add);
    if (!info.norm.empty()) add(name, "norm", [&] { return norm_parameter(info.site, state, place); });
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
  ThinMatrices thin{.rank = step.rank, .seed = derived_seed(seed, static_cast<uint64_t>(place.block))};
  for (const LinearShape& linear : linear_shapes(place.config)) {
    thin.seed = derived_seed(thin.seed, 0);
    if (grids.override_of(linear.name)) {  // this block may leave out what others have
      for (const char* what : kOfWeights) (void)rates.of(linear.name, what);
    }
    for (const WeightParameter& of_weight :
         weight_parameters(linear, state.weights[linear.name], grids, place.compute, thin)) {
      add(linear.name, of_weight.what, of_weight.make);
    }
  }
  rates.check_all_used(step.name);
  return parameters;
}

}  // namespace baseq
