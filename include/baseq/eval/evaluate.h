#pragma once

#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>

#include "baseq/cluster/communicator.h"
#include "baseq/model/model.h"

#pragma GCC visibility push(default)
namespace baseq {

struct Evaluation {
  double perplexity = 0;
  double mean_kl = std::numeric_limits<double>::quiet_NaN();         ///< nats, KL(reference || model) a token
  double top1_agreement = std::numeric_limits<double>::quiet_NaN();  ///< share of tokens with the same best guess
  int64_t num_tokens = 0;                                            ///< predicted tokens
  /// Where values stop being finite in the model and in the reference: block or head, window and tensor. Empty: all
  /// are finite. Numbers above that they spoil are NaN.
  std::string not_finite{}, reference_not_finite{};
};

/// A model that others are compared with. It runs once for all of them, as long as their windows are the same.
///
///     Reference reference{original};
///     for (const Model& model : models) evaluate(model, windows, &reference);
struct Reference {
  const Model& model;
  Tensor windows{}, hidden_states{};  ///< of the last evaluation, which fills them: [n, seq_len] and after the last
                                      ///< norm; of several processes the windows of this one
  std::string not_finite{};           ///< of the same, see Evaluation::reference_not_finite
  LoadOptions load{};                 ///< of the same
};

struct EvaluateOptions {
  LoadOptions load{};  ///< of the model and of the reference
  /// Directory of mapped files that hold the hidden states of all windows; empty: they stay in memory.
  std::filesystem::path activations_directory{};
  std::function<void(int64_t done, int64_t total)> progress{};  ///< of blocks; may be empty
  /// Gets the logits of every token of every window in order, a few rows at a time: [rows, vocab_size] on the CPU. May
  /// be empty. The results are the same with and without it.
  std::function<void(const Tensor& logits)> logits{};
  /// For several processes: each calls evaluate() with all windows, computes its part and gets the result of a single
  /// process. `logits` must be empty then.
  Communicator communicator{};
};

/// Perplexity with the standard protocol: each window on its own, the loss of its last seq_len - 1 tokens, mean over
/// windows. With a reference also KL divergence and top-1 agreement over the same predictions. One block of each
/// model is resident at a time.
///
///     const Tensor ids = tokenize_file("wikitext2-test.txt", open_tokenizer("out"));
///     const double perplexity = evaluate(model, split_windows(ids, 2048), nullptr).perplexity;
///
/// @param windows   integer [n, seq_len], see split_windows
/// @param reference may be null; must share the vocabulary
Evaluation evaluate(const Model& model, const Tensor& windows, Reference* reference,
                    const EvaluateOptions& options = {});

}  // namespace baseq
#pragma GCC visibility pop
