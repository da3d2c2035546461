#pragma once

#include "baseq/model/config.h"
#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The frequencies of a rotary embedding for sequences of `seq_len` tokens, as transformers computes them.
struct RotaryFrequencies {
  Tensor inverse;                 ///< [rotary_dim / 2], float32, radians a token
  double attention_factor = 1.0;  ///< of cos and sin
};

/// The features of a head that turn, the first ones.
int64_t rotary_dim(const RopeParameters& rope, int64_t head_dim);

/// Linear and dynamic interpolation, Llama 3's, YaRN (arXiv 2309.00071) or LongRoPE (arXiv 2402.13753). Dynamic and
/// LongRoPE depend on `seq_len`: all positions turn as those of one forward pass over that many tokens.
RotaryFrequencies rotary_frequencies(const RopeParameters& rope, int64_t head_dim, int64_t max_position_embeddings,
                                     int64_t seq_len);

/// Rotary position embedding in the half-split layout: feature i turns with feature i + rotary_dim / 2; features from
/// rotary_dim on pass.
///
///     const RotaryEmbedding rope = RotaryEmbedding::create(model.config(), q.size(1), q.options());
///     const Tensor turned = rope.forward(q);  // [batch, seq, heads, head_dim]
struct RotaryEmbedding {
  Tensor cos, sin;  ///< [seq, rotary_dim]

  /// Angles in float32 as transformers computes them, then cast to the dtype of `options`.
  static RotaryEmbedding create(const ModelConfig& config, int64_t seq_len, const at::TensorOptions& options);
  /// The same of positions first .. first + count - 1.
  static RotaryEmbedding create(const RotaryFrequencies& frequencies, int64_t first, int64_t count,
                                const at::TensorOptions& options);
  Tensor forward(const Tensor& x) const;  ///< x: [batch, seq, heads, head_dim]
};

}  // namespace baseq
#pragma GCC visibility pop
