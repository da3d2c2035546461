#pragma once

#include <cmath>
#include <functional>
#include <limits>

#include "baseq/model/model.h"

namespace baseq {

struct Evaluation {
  double perplexity = 0;
  double mean_kl = std::numeric_limits<double>::quiet_NaN();         ///< nats, KL(reference || model) a token
  double top1_agreement = std::numeric_limits<double>::quiet_NaN();  ///< share of tokens with the same best guess
  int64_t num_tokens = 0;                                            ///< predicted tokens
};

/// Perplexity with the standard protocol: each window on its own, the loss of its last seq_len - 1 tokens, mean over
/// windows. With a reference also KL divergence and top-1 agreement over the same predictions. One block of each
/// model is resident at a time.
/// @param windows   integer [n, seq_len], see split_windows
/// @param reference may be null; must share the vocabulary
/// @param progress  called with (blocks done, blocks in all); may be empty
Evaluation evaluate(const Model& model, const Tensor& windows, const Model* reference,
                    const std::function<void(int64_t, int64_t)>& progress = {});

/// Non-overlapping windows of a text that was tokenized once, [n, seq_len]; the tail is dropped.
/// @param max_windows 0: all
Tensor split_windows(const Tensor& ids, int64_t seq_len, int64_t max_windows);

}  // namespace baseq
