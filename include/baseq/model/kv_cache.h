#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "baseq/model/config.h"
#include "baseq/model/rotary_embedding.h"
#include "baseq/quant/quantize.h"

#pragma GCC visibility push(default)
namespace baseq {

class BlockCache;

/// How a cache stores keys and values.
struct CacheFormat {
  at::TensorOptions compute;           ///< dtype and device of the model
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
  std::vector<KvCache*> caches;
  std::vector<int64_t> rows;  ///< new tokens of each
  int64_t block = 0;
};

}  // namespace baseq
#pragma GCC visibility pop
