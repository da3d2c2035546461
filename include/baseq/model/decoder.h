#pragma once

#include <span>

#include "baseq/model/kv_cache.h"
#include "baseq/model/model.h"

#pragma GCC visibility push(default)
namespace baseq {

/// A model that stays in memory, for text token by token:
///   const Decoder decoder = Model(open_model("SmolLM2-135M-Instruct")).load();
///   KvCache cache = decoder.new_cache(/*capacity=*/1024);
///   const Tensor logits = decoder.forward(prompt, cache);
/// Copies share the weights. Several threads can use one at a time, each with its own caches.
class Decoder {
 public:
  Decoder(const Model& model, const LoadOptions& options);

  const Model& model() const { return model_; }
  const ModelConfig& config() const { return model_.config(); }
  const LoadOptions& options() const { return options_; }
  int64_t bytes() const;  ///< of the weights in memory; rows of the embedding are read from the checkpoint

  /// Logits of all positions without a cache, in the model's dtype, each sequence on its own.
  /// @param input_ids integers [seq] or [batch, seq]
  /// Returns [seq, vocab_size] or [batch, seq, vocab_size].
  Tensor logits(const Tensor& input_ids) const;

  KvCache new_cache(int64_t capacity) const;

  /// Appends tokens[i] to *caches[i]. A prompt can come in pieces of any length. When it throws, the caches are as
  /// before.
  /// @param tokens at least one for each sequence
  /// @param caches of new_cache, each once
  /// Returns the logits of each sequence's last token, [sequences, vocab_size], or with `all_positions` those of all
  /// tokens, the rows of all sequences one after the other.
  Tensor forward(std::span<const std::span<const int32_t>> tokens, std::span<KvCache* const> caches,
                 bool all_positions = false) const;
  /// The same for one sequence.
  Tensor forward(std::span<const int32_t> tokens, KvCache& cache, bool all_positions = false) const;

 private:
  Tensor head_logits(const Tensor& hidden) const;

  Model model_;
  LoadOptions options_;
  std::vector<DecoderLayer> layers_;
  RmsNorm final_norm_;
  Linear head_;
};

}  // namespace baseq
#pragma GCC visibility pop
