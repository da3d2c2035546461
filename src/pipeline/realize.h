#pragma once

#include <string_view>

#include "block_state.h"

namespace baseq {

/// Where a block stands, and what it computes with.
struct BlockPlace {
  const ModelConfig& config;
  int64_t block = 0;
  at::TensorOptions compute;  ///< float32, and the device
};

/// The block that `original` and `state` are together. Its output is that of `original` up to rounding:
/// - Transforms: the longest prefix that absorbed() allows goes into norms and writers, the rest runs online. A scale
///   at the end of an online transform at a quant point becomes the gain of that point.
/// - Weights: dequantized codes and their correction where there are codes, else the exact ones.
/// A weight takes scales and matrices in its own dtype; from the first Hadamard factor on, in which every element is a
/// sum of many, the products are in float64. The result has the dtype of `place.compute` and contiguous weights.
/// @param original in the basis of the residual stream, any floating dtype; one that is moved here gives its weights
///                 back one by one
DecoderLayer realize(DecoderLayer original, const BlockState& state, const BlockPlace& place);

// Parts of it, for a step that learns. They are differentiable in the tensors of `state` and `transforms`.

/// The transform of a site by what takes its parts.
struct SplitTransform {
  Transform whole;   ///< as the state has it: the columns of readers take its inverse transpose
  Transform merged;  ///< its longest prefix that norms and writers take
  Transform online;  ///< the rest but for `gain`
  Tensor gain;       ///< the scale at its end, for the quant point; undefined: none
};
/// One for every site.
using SplitTransforms = std::map<Site, SplitTransform>;
/// Throws c10::Error where a rest cannot run online.
SplitTransforms split_transforms(const BlockState& state, const BlockPlace& place);

/// Norms, online transforms and quant points of `layer`.
void realize_sites(DecoderLayer& layer, const DecoderLayer& original, const SplitTransforms& transforms,
                   const BlockState& state, const BlockPlace& place);
/// The quant points of `layer` alone.
void realize_points(DecoderLayer& layer, const SplitTransforms& transforms, const BlockState& state,
                    const BlockPlace& place);
/// One linear with its exact weight.
/// @param sums dtype of the products from the first Hadamard factor on
Linear realize_linear(const DecoderLayer& original, std::string_view name, const SplitTransforms& transforms,
                      const BlockPlace& place, at::ScalarType sums);
/// Gives `linear` the rounded weight that `weight` holds.
void round_linear(Linear& linear, const WeightState& weight, const BlockPlace& place);
/// The product of the scales that the weights before `site` have taken, [features].
Tensor merged_scale(Site site, const SplitTransforms& transforms, const BlockPlace& place);

}  // namespace baseq
