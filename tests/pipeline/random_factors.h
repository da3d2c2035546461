#pragma once

#include <cmath>

#include "../tiny_model.h"
#include "baseq/model/decoder_layer.h"
#include "baseq/model/site.h"

namespace baseq::test {

/// A scale that RoPE and norms of q and k let through: equal within rotary pairs, and in all heads where there is such
/// a norm.
inline Tensor query_key_scale(const ModelConfig& config, uint64_t seed) {
  const int64_t kv = config.num_key_value_heads, dim = config.head_dim;
  const Tensor scale = (0.3 * random_normal({kv, dim}, seed)).exp();
  if (config.blocks.at(0).rope) {
    const int64_t half = rotary_dim(config.rope, dim) / 2;
    scale.narrow(1, half, half).copy_(scale.narrow(1, 0, half));
  }
  return config.qk_norm ? scale.narrow(0, 0, 1).repeat({kv, 1}).flatten() : scale.flatten();
}

/// A factor of the size that its site takes.
/// @param online whether an online factor stands before it, which decides about scales at query_key
inline Factor random_factor(Factor::Kind kind, Site site, const ModelConfig& config, uint64_t seed,
                            bool online = false) {
  const bool scale = kind == Factor::Kind::kScale;
  const SiteShape whole = site_shape(site, config);
  if (site == Site::kQueryKey && scale && !online) return scale_factor(query_key_scale(config, seed));
  const int64_t features = site == Site::kQueryKey ? config.head_dim : whole.features;
  const int64_t blocks = site == Site::kValue ? whole.blocks : 1, size = features / blocks;
  switch (kind) {
    case Factor::Kind::kScale:
      return scale_factor((0.3 * random_normal({features}, seed)).exp());
    case Factor::Kind::kHadamard:
      return hadamard_factor(size, blocks);
    case Factor::Kind::kMatrix:
      return matrix_factor(invertible({blocks, size, size}, seed));
    case Factor::Kind::kKronecker:
      return kronecker_factor(invertible({2, 2}, seed), invertible({features / 2, features / 2}, seed + 1));
    case Factor::Kind::kPermutation: {
      const Tensor within = random_normal({blocks, size}, seed).argsort(int64_t{1});
      return permutation_factor((within + size * at::arange(blocks, at::kLong).unsqueeze(1)).flatten());
    }
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Factor::Kind");
}

}  // namespace baseq::test
