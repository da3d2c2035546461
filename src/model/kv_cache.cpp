#include <ATen/ATen.h>

#include <algorithm>

#include "baseq/model/decoder.h"
#include "block_cache.h"
#include "exact_rotary.h"

namespace baseq {
namespace {

/// Tokens that a cache has room for at first; twice as many whenever it is full.
constexpr int64_t kFirstTokens = 64;

}  // namespace

bool has_pages(const std::optional<QuantSpec>& grid, int64_t head_dim) {
  const bool one_scale_a_head = grid && grid->strategy == Strategy::kGroup && grid->group_size == head_dim;
  return head_dim <= kMaxHeadDim && (!grid || (grid->dynamic && one_scale_a_head));
}

KvCache::KvCache(const ModelConfig& config, const CacheFormat& format, int64_t capacity)
    : config_(config), format_(format), capacity_(capacity) {
  TORCH_CHECK(capacity > 0, "KvCache: a capacity of ", capacity, " tokens, expected at least one");
  frequencies_ = rotary_frequencies(config.rope, config.head_dim, config.max_position_embeddings, capacity);
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    if (format.paged) {
      blocks_.push_back(
          std::make_unique<PagedBlockCache>(config.num_key_value_heads, config.head_dim, format.grid, format.stored));
    } else {
      blocks_.push_back(std::make_unique<FloatBlockCache>(config, format));
    }
  }
}
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;
KvCache::~KvCache() = default;

int64_t KvCache::bytes() const {
  int64_t total = 0;
  for (const auto& block : blocks_) total += block->bytes();
  return total;
}

void KvCache::truncate(int64_t length) {
  TORCH_CHECK(length >= 0 && length <= length_, "KvCache: cannot keep ", length, " of ", length_, " tokens");
  length_ = length;
}

void KvCache::reserve(int64_t tokens) {
  TORCH_CHECK(length_ + tokens <= capacity_, "KvCache: ", length_ + tokens, " tokens, but there is room for ",
              capacity_);
  if (length_ + tokens <= reserved_) return;
  const int64_t room = std::min(capacity_, std::max({length_ + tokens, 2 * reserved_, kFirstTokens}));
  for (const auto& block : blocks_) block->reserve(room);
  rope_ = format_.paged ? exact_rotary(frequencies_, room)
                        : RotaryEmbedding::create(frequencies_, 0, room, format_.compute);
  reserved_ = room;
}

RotaryEmbedding KvCache::rope(int64_t tokens) const {
  return {rope_.cos.narrow(0, length_, tokens), rope_.sin.narrow(0, length_, tokens)};
}

void KvCache::advance(int64_t tokens) {
  TORCH_INTERNAL_ASSERT(tokens >= 0 && length_ + tokens <= reserved_);
  length_ += tokens;
}

}  // namespace baseq
