#pragma once

#include <map>
#include <utility>
#include <vector>

#include "open_block.h"

namespace baseq {

/// Loud tokens of what the linears at a site read.
struct Loudest {
  Tensor tokens;  ///< those with the largest values, [tokens, features]
  Tensor maxima;  ///< the largest magnitude of each channel over all tokens, [features]
};
/// Of each site in `at` in `layer` on `stream`, with all points off. Tokens that are not finite do not count.
std::map<Site, Loudest> loudest_tokens(const DecoderLayer& layer, const std::vector<Site>& at, const Tensor& stream,
                                       const BlockInputs& inputs);

/// The factor that a step of kind hadamard, scale, matrix, kronecker or permutation appends to the transform of `site`.
/// @param seen of `site`; undefined unless needs_tokens(step)
/// @param seed of this factor
Factor start_factor(const TransformStep& step, Site site, const ModelConfig& config, const at::TensorOptions& compute,
                    const Loudest& seen = {}, uint64_t seed = 0);

/// Whether start_factor() needs to see tokens.
bool needs_tokens(const TransformStep& step);

/// Sizes of the two matrices of a Kronecker factor at a site: heads and features of a head at o, else the divisors next
/// to the root of the number of features, the smaller one first.
std::pair<int64_t, int64_t> kronecker_sizes(Site site, const ModelConfig& config);

}  // namespace baseq
