#pragma once

#include "block_state.h"

namespace baseq {

/// A rounded weight as what is learned about its codes and its grid makes it, with its correction; differentiable.
/// @param source what is rounded anew, see LearnedCodes; undefined: the codes stay
Tensor learned_weight(const Tensor& source, const WeightState& weight);

/// Puts the codes of learned_weight() and the grid into `weight`, for good.
void settle(WeightState& weight, const Tensor& source);

}  // namespace baseq
