#pragma once

#include <functional>
#include <string>
#include <vector>

#include "baseq/model/model.h"
#include "parameters.h"

namespace baseq {

/// How the pairs of matrices begin whose product is learned: [out_features, rank] with zeros, [rank, in_features]
/// drawn.
struct ThinMatrices {
  int64_t rank = 0;  ///< 0: what can be learned without is
  uint64_t seed = 0;
};

/// Something about the weight of a linear that can be learned.
struct WeightParameter {
  const char* what;  ///< the last part of its name in rates: "weight_clip"
  std::function<Parameter()> make;
};

/// What there is to learn about a weight, at the values of `weight`. None of it is made before it is asked for.
/// - weight_clip: shares of each range, as logits: one, or on an asymmetric grid one for either end (OmniQuant's LWC,
///   arXiv 2308.13137);
/// - weight_lora: a product of rank `thin.rank` that is added to a weight before it is rounded; its rate is about in
///   root mean squares of the weight (SliderQuant, arXiv 2603.25284);
/// - low_rank: the factors of a correction;
/// - weight_offset: what is added to a rounded weight before it is rounded again, in steps of its grid and within half
///   a step: each element (AutoRound's V, arXiv 2309.05516), or with a rank a product (CBQ, arXiv 2312.07950);
/// - weight_value: a change of a rounded weight before it is rounded again, as far as it likes. Its rate is in steps of
///   the grid at the start (Block-AP of EfficientQAT, arXiv 2407.11062);
/// - weight_scale: logarithms of what multiplies the scales of a rounded weight; alone, the codes stay;
/// - weight_zero_point: what is added to zero points, which stay integers.
/// @param weight, grids must outlive the result
std::vector<WeightParameter> weight_parameters(const LinearShape& linear, const WeightState& weight, const Grids& grids,
                                               const at::TensorOptions& compute, const ThinMatrices& thin = {});

}  // namespace baseq
