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

/// Turns on the recipe's quant points: grids, starting clips, and shifts at zero or at the channel means that the
/// unquantized layer shows on the stream it will be given.
/// @param inputs may be undefined when no shift starts at a mean
void start_quant_points(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights);

/// The recipe's merged and online Hadamard transforms behind the residual stream, in this order: values, q and k, the
/// inputs of o and down, the norms' outputs.
void apply_hadamards(DecoderLayer& layer, const Recipe::Transforms& transforms);

/// Stage 1: a rotation and paired scales of the values, and paired scales at o and down, learned with straight-through
/// weights and quantized inputs of o and down, then merged. Takes the place of apply_hadamards.
void learn_transforms(DecoderLayer& layer, const LearningTask& task);

/// Stage 3: clips, shifts and gains of the quant points, weights frozen.
void learn_activations(DecoderLayer& layer, const LearningTask& task);

/// Leaves to inference what cannot be merged: gains behind a norm move into its weight, and `W shift` into the biases
/// of the linears that read a point, which then only subtracts.
void merge_corrections(DecoderLayer& layer);

}  // namespace baseq
