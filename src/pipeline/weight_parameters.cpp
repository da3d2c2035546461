#include "weight_parameters.h"

#include <ATen/ATen.h>

#include <cmath>
#include <utility>

#include "quant/cells.h"

namespace baseq {
namespace {

using OfRounded = Parameter::OfRounded;

/// A start at exactly 1 would have no gradient through the sigmoid.
constexpr double kLargestWeightClip = 0.999;
/// Where learned clips of weights start, sigmoid(4) as in OmniQuant (arXiv 2308.13137).
constexpr double kWeightClip = 0.982;
/// The gradient of one element of a weight or of a low-rank factor shrinks with the size of the weight.
constexpr double kElementEpsilon = 1e-15;
/// An offset moves a value to a neighbouring code at most.
constexpr double kLargestOffset = 0.5;

Tensor weight_leaf(const Tensor& value) { return value.detach().clone().requires_grad_(true); }

Parameter weight_clip_parameter(const LinearShape& linear, const WeightState& weight, const QuantSpec& spec,
                                const at::TensorOptions& options) {
  const int64_t rows = spec.strategy == Strategy::kTensor ? 1 : linear.out_features;
  const int64_t groups = spec.strategy == Strategy::kGroup ? linear.in_features / spec.group_size : 1;
  const int64_t ends = spec.symmetric ? 1 : 2;
  const Tensor start = weight.clip.defined() ? weight.clip : at::full({rows, groups, ends}, kWeightClip, options);
  const Tensor logit = weight_leaf(at::logit(start.clamp_max(kLargestWeightClip)));
  const std::string name = linear.name;
  return {.leaves = {logit},
          .write = [name, logit](BlockState& to) { to.weights[name].clip = at::sigmoid(logit); },
          .reaches = {name}};
}

/// Its rate is in units of the root mean square of A.
Parameter low_rank_parameter(const std::string& name, const LowRankFactors& factors) {
  const Tensor a = weight_leaf(factors.dequantized_A()), b = weight_leaf(factors.dequantized_B());
  return {.leaves = {a, b},
          .rate = std::sqrt(a.detach().square().mean().item<double>()),
          .epsilon = kElementEpsilon,
          .write = [name, a, b](BlockState& state) { state.weights.at(name).low_rank = {.A = a, .B = b}; },
          .reaches = {name},
          .of_rounded = OfRounded::kCorrection};
}

/// @param options of the leaf
Parameter offset_parameter(const std::string& name, const QuantizedWeight& rounded, const at::TensorOptions& options) {
  const Tensor offset = weight_leaf(at::zeros(rounded.codes.sizes(), options));
  return {.leaves = {offset},
          .epsilon = kElementEpsilon,
          .write = [name, offset](BlockState& state) { state.weights.at(name).learned.offset = offset; },
          .reaches = {name},
          .of_rounded = OfRounded::kCodes,
          .project = [offset] { offset.clamp_(-kLargestOffset, kLargestOffset); }};
}

Parameter value_parameter(const std::string& name, const QuantizedWeight& rounded, const at::TensorOptions& options) {
  const Tensor steps = weight_leaf(at::zeros(rounded.codes.sizes(), options));
  const QuantSpec spec = rounded.spec;
  const Tensor scale = rounded.qparams.scale.to(options);
  return {.leaves = {steps},
          .epsilon = kElementEpsilon,
          .write = [name, steps, spec, scale](
                       BlockState& state) { state.weights.at(name).learned.change = in_units_of(steps, scale, spec); },
          .reaches = {name},
          .of_rounded = OfRounded::kCodes};
}

Parameter weight_scale_parameter(const std::string& name, const QuantizedWeight& rounded) {
  const Tensor start = rounded.qparams.scale, logarithm = weight_leaf(at::zeros_like(start));
  const QuantSpec spec = rounded.spec;
  return {.leaves = {logarithm},
          .epsilon = kElementEpsilon,
          .write =
              [name, start, logarithm, spec](BlockState& state) {
                state.weights.at(name).codes->qparams.scale = round_scale(start * logarithm.exp(), spec);
              },
          .reaches = {name},
          .of_rounded = OfRounded::kGrid};
}

Parameter zero_point_parameter(const std::string& name, const QuantizedWeight& rounded) {
  const Tensor start = rounded.qparams.zero_point, change = weight_leaf(at::zeros_like(start));
  const QuantSpec spec = rounded.spec;
  return {.leaves = {change},
          .epsilon = kElementEpsilon,
          .write =
              [name, start, change, spec](BlockState& state) {
                state.weights.at(name).codes->qparams.zero_point = round_zero_point(start + change, spec);
              },
          .reaches = {name},
          .of_rounded = OfRounded::kGrid};
}

}  // namespace

std::vector<WeightParameter> weight_parameters(const LinearShape& linear, const WeightState& weight, const Grids& grids,
                                               const at::TensorOptions& compute) {
  std::vector<WeightParameter> parameters;
  const std::string name = linear.name;
  if (grids.weights) {
    parameters.push_back({"weight_clip", [&linear, &weight, &grids, compute] {
                            return weight_clip_parameter(linear, weight, *grids.weights, compute);
                          }});
  }
  if (weight.low_rank.defined()) {
    parameters.push_back({"low_rank", [name, &weight] { return low_rank_parameter(name, weight.low_rank); }});
  }
  if (!weight.codes) return parameters;
  parameters.push_back(
      {"weight_offset", [name, &weight, compute] { return offset_parameter(name, *weight.codes, compute); }});
  parameters.push_back(
      {"weight_value", [name, &weight, compute] { return value_parameter(name, *weight.codes, compute); }});
  parameters.push_back({"weight_scale", [name, &weight] { return weight_scale_parameter(name, *weight.codes); }});
  if (weight.codes->qparams.zero_point.defined()) {
    parameters.push_back({"weight_zero_point", [name, &weight] { return zero_point_parameter(name, *weight.codes); }});
  }
  return parameters;
}

}  // namespace baseq
