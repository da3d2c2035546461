#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// How the next token is drawn from the logits. What a field's default says changes nothing.
struct SamplingOptions {
  double temperature = 1.0;  ///< logits are divided by it; 0: the most probable token, the lowest id of equal ones
  int64_t top_k = 0;         ///< only so many of the most probable tokens; 0: all
  double top_p = 1.0;        ///< only the fewest most probable tokens that have this probability together
  double min_p = 0.0;        ///< only tokens with this share of the largest probability
  double repetition_penalty =
      1.0;  ///< of tokens that are there: logits > 0 divided by it, others times it (1909.05858)
  uint64_t seed = 0;

  /// Throws c10::Error naming the field that is out of range.
  void check() const;
};

/// The token that follows `sequence`: penalty, temperature, top_k, top_p, min_p, then a draw that depends on the seed
/// and the position alone. Of equal logits, top_k and top_p prefer the lower id.
/// @param logits float32 [vocab_size] on the CPU; throws c10::Error when one is NaN or +inf
/// @param sequence all tokens before it, the prompt included
int32_t sample(const Tensor& logits, std::span<const int32_t> sequence, const SamplingOptions& options);

/// A number from 0 to 1, 1 excluded, for one position of a sequence: Philox4x32-10 (Salmon et al., 2011) with the seed
/// as key.
double random_unit(uint64_t seed, uint64_t position);

/// A token's log probability under the model, and those of the most probable tokens.
struct TokenLogprobs {
  int32_t id = 0;
  double logprob = 0;
  std::vector<std::pair<int32_t, double>> top;  ///< the most probable first, of equal ones the lower id
};
/// @param logits float32 [vocab_size] on the CPU, as the model gives them: no penalty, no temperature
TokenLogprobs token_logprobs(const Tensor& logits, int32_t id, int64_t top);

}  // namespace baseq
#pragma GCC visibility pop
