#pragma once

#include <initializer_list>

#include "baseq/pipeline/activations.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Turns on the recipe's quant points: grids, starting clips, and shifts at zero or at the channel means that the
/// unquantized layer shows on the stream it will be given.
/// @param inputs may be undefined when no shift starts at a mean
/// @param only   the sites whose points to turn on; empty: all
void start_quant_points(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights,
                        std::initializer_list<Site> only = {});

}  // namespace baseq
