#pragma once

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// The two activation streams at the input of one block, [num_samples, seq, hidden_size]: as the full-precision prefix
/// and as the already quantized prefix produce them.
struct BlockInputs {
  Tensor full_precision;
  Tensor quantized;
  RotaryEmbedding rope;
  bool defined() const { return quantized.defined(); }
};

/// fn(windows) over consecutive slices [<= batch, seq, hidden] of a stream, about 2048 tokens each.
void for_each_batch(const Tensor& stream, const std::function<void(int64_t begin, const Tensor& windows)>& fn);

/// A stream after `layer`.
Tensor advance(const DecoderLayer& layer, const Tensor& stream, const RotaryEmbedding& rope);

/// Rounds the seven linears of `layer` in the order in which data passes them (q, k, v; o; gate, up; down): each sees
/// inputs that the already rounded ones produced. Their weights become the dequantized ones.
/// @param inputs  may be undefined when the recipe rounds to nearest
/// @param weights of the tokens, [num_samples, seq]; undefined where inputs are
/// @param block   for the events only
void round_layer(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights,
                 int64_t block, const ProgressFn& progress);

}  // namespace baseq
