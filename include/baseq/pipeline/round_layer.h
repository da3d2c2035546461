#pragma once

#include "baseq/pipeline/activations.h"
#include "baseq/pipeline/progress.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Rounds the seven linears of `layer` in the order in which data passes them (q, k, v; o; gate, up; down): each sees
/// inputs that the already rounded ones produced. Their weights become the dequantized ones, with the low-rank
/// correction if the recipe has one.
/// @param inputs  may be undefined unless recipe.rounding_needs_moments()
/// @param weights of the tokens, [num_samples, seq]; undefined where inputs are
/// @param block   for the events only
void round_layer(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights,
                 int64_t block, const ProgressFn& progress);

}  // namespace baseq
