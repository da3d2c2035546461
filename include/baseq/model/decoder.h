#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "baseq/model/config.h"
#include "baseq/model/decoder_layer.h"
#include "baseq/model/model.h"
#include "baseq/quant/quantize.h"

#pragma GCC visibility push(default)
namespace baseq {

class BlockCache;

/// How a cache stores keys and values.
struct CacheFormat {
  at::TensorOptions compute{};         ///< dtype and device of the model
  at::ScalarType stored = at::kFloat;  ///< of keys and values that are not stored as codes
  /// In pages, as `grid` says or in `stored`, and RoPE as docs/arithmetic.md says: for prepared blocks, see has_pages.
  bool paged = false;
  std::optional<QuantSpec> grid = {};
};
/// Whether attention to a cache with this grid is defined to the bit. It needs one scale per token and head, or no
/// grid.
bool has_pages(const std::optional<QuantSpec>& grid, int64_t head_dim);
/// The dtype of pages without a grid.
constexpr at::ScalarType kPagedFloats = at::kHalf;

/// Keys and values of one sequence in all blocks of a model: see Decoder::forward. Memory grows with the tokens.
class KvCache {
 public:
  /// @param capacity tokens at most; the frequencies of RoPE are those of sequences of that length
  KvCache(const ModelConfig& config, const CacheFormat& format, int64_t capacity);
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;
  ~KvCache();

  int64_t length() const { return length_; }  ///< tokens
  int64_t capacity() const { return capacity_; }
  int64_t bytes() const;
  /// Keeps the first `length` tokens. Throws c10::Error when there are fewer.
  void truncate(int64_t length);

  // What a forward pass does.

  /// Makes room for `tokens` more. Throws c10::Error beyond the capacity.
  void reserve(int64_t tokens);
  /// RoPE of the next `tokens` positions. Call reserve() first.
  RotaryEmbedding rope(int64_t tokens) const;
  BlockCache& block(int64_t index) const { return *blocks_[static_cast<size_t>(index)]; }
  /// Adds to length() once every block has stored the tokens.
  void advance(int64_t tokens);

 private:
  ModelConfig config_;
  CacheFormat format_;
  int64_t capacity_, reserved_ = 0, length_ = 0;
  RotaryEmbedding rope_;  ///< of the positions that there is room for
  RotaryFrequencies frequencies_;
  std::vector<std::unique_ptr<BlockCache>> blocks_;
};

/// Where the rows of a forward pass belong: those of all sequences one after the other.
struct CachedRows {
  std::vector<KvCache*> caches{};
  std::vector<int64_t> rows{};  ///< new tokens of each
  int64_t block = 0;
};

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
