#pragma once

#include <initializer_list>
#include <map>

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/recipe.h"
#include "baseq/tensor.h"
#include "pipeline/activations.h"

namespace baseq {

/// What a token counts, [num_samples, seq] with the options `compute`, mean 1 over those that count: the same for all,
/// or the inverse of its energy in the block's output. Zero where that output is not finite.
/// @param target the output for the windows of this process; what is returned is of all windows
Tensor token_weights(const Tensor& target, Recipe::TokenWeights kind, const at::TensorOptions& compute,
                     const Shards& shards = {});

/// The sum of the weights of this process' tokens and of those of the others.
double weight_of_all(const Tensor& weights, const Shards& shards);

/// Takes the tokens that have a value which is not finite in one of `inputs` out of all of them: their values and
/// weights become zero. On the CPU the tensors stay the same ones where there is none; on other devices nothing is read
/// back to find that out.
/// @param inputs  [tokens, features] each, or undefined
/// @param weights [tokens, 1]
/// @return the sum of the weights that became zero, float64 []; undefined where none did
Tensor drop_tokens_not_finite(std::initializer_list<Tensor*> inputs, Tensor& weights);

/// Weighted first and second moments of a tensor's channels, float64.
struct Moments {
  Tensor mean;        ///< [features]
  Tensor covariance;  ///< [features, features], about the mean; undefined unless asked for
  Tensor variance;    ///< [features]
  Tensor maximum;     ///< largest magnitude, [features]; undefined unless asked for
};

/// Moments of everything that is quantized in a block, from one pass.
struct BlockMoments {
  std::map<Site, Moments> sites;  ///< of what each quant point sees
  Moments query;                  ///< of q after its norm, before RoPE

  const Moments& at(Site site) const { return sites.at(site); }
};

struct MeasureOptions {
  bool with_o_covariance = false;
  bool with_maxima = false;
  Site last = Site::kDown;  ///< the pass ends here; moments of later sites stay undefined
};

/// Passes a stream through `layer`, whose quant points are looked past.
/// Tokens that are not finite at a point do not count there.
/// @param weights of the tokens, [num_samples, seq]
BlockMoments measure_block(const DecoderLayer& layer, const Tensor& stream, const RotaryEmbedding& rope,
                           const Tensor& weights, const MeasureOptions& measure = {}, const PassOptions& options = {});

/// `layer` with every quant point off and without shifts. Gains stay: weights may hold their inverse.
DecoderLayer without_quant_points(DecoderLayer layer);

}  // namespace baseq
