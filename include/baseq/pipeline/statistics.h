#pragma once

#include "baseq/pipeline/activations.h"
#include "baseq/pipeline/recipe.h"
#include "baseq/pipeline/round_layer.h"
#include "baseq/tensor.h"

namespace baseq {

/// What a token counts, [num_samples, seq] with the options `compute`, mean 1: the same for all, or the inverse of its
/// energy in the block's output (Recipe::Loss::kRelative).
Tensor token_weights(const Tensor& target, Recipe::Loss loss, const at::TensorOptions& compute);

/// Weighted first and second moments of a tensor's channels, float64.
struct Moments {
  Tensor mean;        ///< [features]
  Tensor covariance;  ///< [features, features], about the mean; undefined unless asked for
  Tensor variance;    ///< [features]
};

/// Moments of everything that is quantized in a block, from one pass.
struct BlockMoments {
  Moments qkv, o, gate_up, down;  ///< of the four input points
  Moments key, value;             ///< of the cache, [num_kv_heads * head_dim]
  Moments query;                  ///< of q after its norm, before RoPE
};

/// Passes a stream through `layer`, whose quant points are looked past.
/// @param weights           of the tokens, [num_samples, seq]
/// @param with_o_covariance also the covariance at o
/// @param last              where the pass ends; moments of what lies behind it stay undefined
BlockMoments measure_block(const DecoderLayer& layer, const Tensor& stream, const RotaryEmbedding& rope,
                           const Tensor& weights, bool with_o_covariance, InputPoint last = InputPoint::kDown,
                           const PassOptions& options = {});

/// `layer` with every quant point off and without shifts. Gains stay: weights may hold their inverse.
DecoderLayer without_quant_points(DecoderLayer layer);

}  // namespace baseq
