#include "parameters.h"

#include <ATen/ATen.h>

#include <cmath>
#include <set>
#include <utility>

#include "baseq/model/model.h"
#include "weight_parameters.h"

namespace baseq {
namespace {

/// Clips are learned through a sigmoid; a start at exactly 1 would have no gradient.
constexpr double kLargestClip = 0.999;

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

/// Where a factor that is learned multiplies activations, and leaves the rows of writers as they are.
bool acts_on_activations(Site site) { return site == Site::kDown; }

/// Linears whose rows or columns a factor at a site changes while it is learned.
std::vector<std::string> linears_around(Site site) {
  const SiteInfo& info = site_info(site);
  std::vector<std::string> names(info.readers.begin(), info.readers.end());
  if (!acts_on_activations(site)) names.insert(names.end(), info.writers.begin(), info.writers.end());
  return names;
}

Parameter scale_parameter(Site site, const Factor& factor) {
  const Tensor logarithm = leaf(factor.left.log());
  return {.leaves = {logarithm},
          .write =
              [site, logarithm](BlockState& state) {
                Factor& scale = *find_factor(state, site, Factor::Kind::kScale);
                scale.left = logarithm.exp();
                scale.left_inverse = (-logarithm).exp();
              },
          .reaches = linears_around(site),
          .moves = true,
          .on_activations = acts_on_activations(site)};
}

Parameter matrix_parameter(Site site, const Factor& factor) {
  const Tensor turn = leaf(at::zeros_like(factor.left));
  return {.leaves = {turn},
          .write =
              [site, turn, start = factor.detach()](BlockState& state) {
                Factor& matrix = *find_factor(state, site, Factor::Kind::kMatrix);
                const Tensor rotation = cayley(turn);
                matrix.left = at::matmul(rotation, start.left);
                if (!start.orthogonal()) matrix.left_inverse = at::matmul(start.left_inverse, rotation.mT());
              },
          .reaches = linears_around(site),
          .moves = true};
}

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

}  // namespace

std::vector<Parameter> make_parameters(const LearnStep& step, const BlockState& from, const BlockPlace& place,
                                       const Grids& grids) {
  std::vector<Parameter> parameters;
  Rates rates(step.rates);
  BlockState state = from;
  const auto add = [&](const std::string& where, const char* what, const auto& make) {
    const std::optional<double> rate = rates.of(where, what);
    if (!rate) return;
    Parameter parameter = make();
    parameter.name = where + "." + what;
    parameter.rate *= *rate;
    parameters.push_back(std::move(parameter));
  };
  for (const SiteInfo& info : sites()) {
    const std::string name(info.name);
    // RoPE passes no other scales than those that are equal within each pair.
    const Factor* scale = info.site == Site::kQueryKey ? nullptr : find_factor(state, info.site, Factor::Kind::kScale);
    if (scale) {
      add(name, "scale", [&] { return scale_parameter(info.site, *scale); });
    }
    if (const Factor* matrix = find_factor(state, info.site, Factor::Kind::kMatrix)) {
      add(name, "matrix", [&] { return matrix_parameter(info.site, *matrix); });
    }
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
    for (const WeightParameter& of_weight :
         weight_parameters(linear, state.weights[linear.name], grids, place.compute)) {
      add(linear.name, of_weight.what, of_weight.make);
    }
  }
  rates.check_all_used(step.name);
  return parameters;
}

}  // namespace baseq
