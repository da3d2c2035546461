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

}  // namespace baseq
