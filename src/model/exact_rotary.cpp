#include "exact_rotary.h"

#include <ATen/ATen.h>

namespace baseq {

RotaryEmbedding exact_rotary(const RotaryFrequencies& frequencies, int64_t seq_len) {
  const Tensor angles = at::outer(at::arange(seq_len, at::kFloat), frequencies.inverse).repeat({1, 2}).to(at::kDouble);
  const auto table = [&](const Tensor& values) {
    const Tensor rounded = values.to(at::kFloat);
    return frequencies.attention_factor == 1 ? rounded : rounded * frequencies.attention_factor;
  };
  return {table(at::cos(angles)), table(at::sin(angles))};
}

RotaryEmbedding rotary_of(const Model& model, int64_t seq_len, const LoadOptions& options) {
  if (!model.runs_integers(options)) return model.rotary(seq_len);
  const ModelConfig& config = model.config();
  return exact_rotary(rotary_frequencies(config.rope, config.head_dim, config.max_position_embeddings, seq_len),
                      seq_len);
}

}  // namespace baseq
