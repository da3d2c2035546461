#pragma once

#include <functional>

#include "baseq/pipeline/recipe.h"
#include "baseq/pipeline/round_layer.h"
#include "baseq/tensor.h"

namespace baseq {

/// What a token counts, [num_samples, seq] float32, mean 1: the same for all, or the inverse of its energy in the
/// block's output (Recipe::Loss::kRelative).
Tensor token_weights(const Tensor& target, Recipe::Loss loss);

/// Weighted first and second moments of a tensor's channels, float64.
struct Moments {
  Tensor mean;        ///< [features]
  Tensor covariance;  ///< [features, features], about the mean; undefined unless asked for
  Tensor variance;    ///< [features]
};

/// Moments of fn(windows) -> [batch, seq, features] over a stream.
Moments measure_moments(const Tensor& stream, const Tensor& weights, bool with_covariance,
                        const std::function<Tensor(const Tensor& windows)>& fn);

/// What enters the K (or V) cache quantizer of `layer`: [batch, seq, num_kv_heads * head_dim].
Tensor cache_input(const DecoderLayer& layer, bool key, const Tensor& windows, const RotaryEmbedding& rope);

/// `layer` with every quant point off and without corrections.
DecoderLayer without_quant_points(DecoderLayer layer);

}  // namespace baseq
