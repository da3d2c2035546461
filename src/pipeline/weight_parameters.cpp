#include "weight_parameters.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <utility>

#include "quant/cells.h"

namespace baseq {
namespace {

using OfRounded = Parameter::OfRounded;

/// Where learned clips of weights start, sigmoid(4) as in OmniQuant (arXiv 2308.13137).
constexpr double kWeightClip = 0.982;
/// The gradient of one element of a weight or of a low-rank factor shrinks with the size of the weight.
constexpr double kElementEpsilon = 1e-15;
/// An offset moves a value to a neighbouring code at most.
constexpr double kLargestOffset = 0.5;

Parameter weight_clip_parameter(const LinearShape& linear, const WeightState& weight, const QuantSpec& spec,
                                const at::TensorOptions& options) {
  const int64_t rows = spec.strategy == Strategy::kTensor ? 1 : linear.out_features;
  const int64_t groups = spec.strategy == Strategy::kGroup ? linear.in_features / spec.group_size : 1;
  const int64_t ends = spec.symmetric ? 1 : 2;
  const Tensor start = weight.clip.defined() ? weight.clip : at::full({rows, groups, ends}, kWeightClip, options);
  const Tensor logit = new_leaf(at::logit(start.clamp_max(kLargestClip)));
  const std::string name = linear.name;
  return {.leaves = {logit},
          .write = [name, logit](BlockState& to) { to.weights[name].clip = at::sigmoid(logit); },
          .reaches = {name}};
}

/// Its rate is in units of the root mean square of A.
Parameter low_rank_parameter(const std::string& name, const LowRankFactors& factors) {
  const Tensor a = new_leaf(factors.dequantized_A()), b = new_leaf(factors.dequantized_B());
  return {.leaves = {a, b},
          .rate = std::sqrt(a.detach().square().mean().item<double>()),
          .epsilon = kElementEpsilon,
          .write = [name, a, b](BlockState& state) { state.weights.at(name).low_rank = {.A = a, .B = b}; },
          .reaches = {name},
          .of_rounded = OfRounded::kCorrection};
}

/// [rank, in_features] of variance 1 / rank: a step of the other matrix changes the product by about its rate.
Tensor draw_thin(const ThinMatrices& thin, int64_t in_features, const at::TensorOptions& options) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(thin.seed);
  const Tensor drawn = at::randn({thin.rank, in_features}, generator, at::kDouble);
  return (drawn / std::sqrt(static_cast<double>(thin.rank))).to(options);
}

/// Continues with what is there, whatever its rank.
Parameter lora_parameter(const LinearShape& linear, const LowRankFactors& added, const ThinMatrices& thin,
                         const at::TensorOptions& options) {
  // About the root mean square of a weight.
  const double unit = 1 / std::sqrt(static_cast<double>(linear.in_features));
  const Tensor a = new_leaf(added.defined() ? added.A : draw_thin(thin, linear.in_features, options));
  const Tensor b = new_leaf(added.defined() ? added.B / unit : at::zeros({linear.out_features, thin.rank}, options));
  const std::string name = linear.name;
  return {.leaves = {a, b},
          .epsilon = kElementEpsilon,
          .write = [=](BlockState& state) { state.weights[name].added = {.A = a, .B = b * unit}; },
          .reaches = {name}};
}

/// The offset as a product, which a sigmoid keeps within its range.
Parameter thin_offset_parameter(const std::string& name, const QuantizedWeight& rounded, const ThinMatrices& thin,
                                const at::TensorOptions& options) {
  const Tensor left = new_leaf(at::zeros({rounded.codes.size(0), thin.rank}, options));
  const Tensor right = new_leaf(draw_thin(thin, rounded.codes.size(1), options));
  return {.leaves = {left, right},
          .epsilon = kElementEpsilon,
          .write =
              [=](BlockState& state) {
                const Tensor product = at::matmul(left, right);
                state.weights.at(name).learned.offset = kLargestOffset * (product / kLargestOffset).tanh();
              },
          .reaches = {name},
          .of_rounded = OfRounded::kCodes};
}

/// @param options of the leaf
Parameter offset_parameter(const std::string& name, const QuantizedWeight& rounded, const at::TensorOptions& options) {
  const Tensor offset = new_leaf(at::zeros(rounded.codes.sizes(), options));
  return {.leaves = {offset},
          .epsilon = kElementEpsilon,
          .write = [name, offset](BlockState& state) { state.weights.at(name).learned.offset = offset; },
          .reaches = {name},
          .of_rounded = OfRounded::kCodes,
          .project = [offset] { offset.clamp_(-kLargestOffset, kLargestOffset); }};
}

Parameter value_parameter(const std::string& name, const QuantizedWeight& rounded, const at::TensorOptions& options) {
  const Tensor steps = new_leaf(at::zeros(rounded.codes.sizes(), options));
  const QuantSpec spec = rounded.spec;
  const Tensor scale = rounded.qparams.scale.to(options);
  return {.leaves = {steps},
          .epsilon = kElementEpsilon,
          .write = [name, steps, spec, scale](
                       BlockState& state) { state.weights.at(name).learned.change = in_units_of(steps, scale, spec); },
          .reaches = {name},
          .of_rounded = OfRounded::kCodes};
}

/// A tensor of the grid.
/// @param moved the tensor after a change, which begins at zero
Parameter grid_parameter(const std::string& name, const QuantizedWeight& rounded, Tensor QParams::*member,
                         Tensor (*moved)(const Tensor& start, const Tensor& change, const QuantSpec& spec)) {
  const Tensor start = rounded.qparams.*member, change = new_leaf(at::zeros_like(start));
  return {
      .leaves = {change},
      .epsilon = kElementEpsilon,
      .write = [=, spec = rounded.spec](
                   BlockState& state) { state.weights.at(name).codes->qparams.*member = moved(start, change, spec); },
      .reaches = {name},
      .of_rounded = OfRounded::kGrid};
}

/// Scales are learned as logarithms.
Tensor moved_scale(const Tensor& start, const Tensor& change, const QuantSpec& spec) {
  return round_scale(start * change.exp(), spec);
}

Tensor moved_zero_point(const Tensor& start, const Tensor& change, const QuantSpec& spec) {
  return round_zero_point(start + change, spec);
}

}  // namespace

std::vector<WeightParameter> weight_parameters(const LinearShape& linear, const WeightState& weight, const Grids& grids,
                                               const at::TensorOptions& compute, const ThinMatrices& thin) {
  std::vector<WeightParameter> parameters;
  const std::string name = linear.name;
  if (const std::optional<QuantSpec>& grid = grids.weights_of(name)) {
    parameters.push_back({"weight_clip", [&linear, &weight, &grid, compute] {
                            return weight_clip_parameter(linear, weight, *grid, compute);
                          }});
    parameters.push_back({"weight_lora", [&linear, &weight, thin, compute] {
                            return lora_parameter(linear, weight.added, thin, compute);
                          }});
  }
  if (weight.low_rank.defined()) {
    parameters.push_back({"low_rank", [name, &weight] { return low_rank_parameter(name, weight.low_rank); }});
  }
  if (!weight.codes) return parameters;
  parameters.push_back({"weight_offset", [name, &weight, compute, thin] {
                          return thin.rank > 0 ? thin_offset_parameter(name, *weight.codes, thin, compute)
                                               : offset_parameter(name, *weight.codes, compute);
                        }});
  parameters.push_back(
      {"weight_value", [name, &weight, compute] { return value_parameter(name, *weight.codes, compute); }});
  parameters.push_back(
      {"weight_scale", [name, &weight] { return grid_parameter(name, *weight.codes, &QParams::scale, moved_scale); }});
  if (weight.codes->qparams.zero_point.defined()) {
    parameters.push_back({"weight_zero_point", [name, &weight] {
                            return grid_parameter(name, *weight.codes, &QParams::zero_point, moved_zero_point);
                          }});
  }
  return parameters;
}

}  // namespace baseq
