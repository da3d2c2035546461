#pragma once

#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"
#include "baseq/pipeline/round_layer.h"

namespace baseq {

/// What both learned stages of BASE-Q (arXiv 2506.15689) are given of one block.
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

}  // namespace baseq
