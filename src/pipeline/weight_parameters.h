#pragma once

#include <functional>
#include <string>
#include <vector>

#include "baseq/model/model.h"
#include "parameters.h"

namespace baseq {

/// Something about the weight of a linear that can be learned.
struct WeightParameter {
  const char* what;  ///< the last part of its name in rates: "weight_clip"
  std::function<Parameter()> make;
};

/// What there is to learn about a weight, at the values of `weight`. None of it is made before it is asked for.
/// - weight_clip: shares of each range, as logits: one, or on an asymmetric grid one for either end (OmniQuant's LWC,
///   arXiv 2308.13137);
/// - low_rank: the factors of a correction;
/// - weight_offset: what is added to a rounded weight before it is rounded again, in steps of its grid and within half
///   a step (AutoRound's V, arXiv 2309.05516);
/// - weight_value: a change of a rounded weight before it is rounded again, as far as it likes. Its rate is in steps of
///   the grid at the start (Block-AP of EfficientQAT, arXiv 2407.11062);
/// - weight_scale: logarithms of what multiplies the scales of a rounded weight; alone, the codes stay;
/// - weight_zero_point: what is added to zero points, which stay integers.
/// @param weight, grids must outlive the result
std::vector<WeightParameter> weight_parameters(const LinearShape& linear, const WeightState& weight, const Grids& grids,
                                               const at::TensorOptions& compute);

}  // namespace baseq
