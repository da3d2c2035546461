#pragma once

#include <map>
#include <string>

#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"
#include "baseq/pipeline/round_layer.h"

namespace baseq {

/// What a learned stage is given of one block; stages 1 and 3 are those of BASE-Q (arXiv 2506.15689).
struct LearningTask {
  const Recipe& recipe;
  const BlockInputs& inputs;
  const Tensor& target;         ///< the full-precision block's output, [num_samples, seq, hidden_size]
  const Tensor& token_weights;  ///< [num_samples, seq], mean 1
  uint64_t seed = 0;
  int64_t block = 0;
  const ProgressFn& progress;
};

/// Stage 1: a rotation and paired scales of the values, and paired scales at o and down, learned with straight-through
/// weights and quantized inputs of o and down, then merged. Takes the place of apply_hadamards.
void learn_transforms(DecoderLayer& layer, const LearningTask& task);

/// Stage 3: clips, shifts and gains of the quant points, weights frozen.
void learn_activations(DecoderLayer& layer, const LearningTask& task);

/// FBQuant's factors (quant/fbquant.h) of all linears of a block together, on the block's output instead of each
/// linear's own: W_F = Q(W - B A) + B A in the forward, Q a constant. `layer` is what round_layer made with method
/// "fbquant", from which this starts and which it keeps when no epoch is better.
/// @param weights of the seven linears before they were rounded, float32, by name
void learn_low_rank(DecoderLayer& layer, const std::map<std::string, Tensor>& weights, const LearningTask& task);

}  // namespace baseq
