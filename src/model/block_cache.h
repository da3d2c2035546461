#pragma once

#include <memory>

#include "baseq/model/decoder_layer.h"
#include "baseq/model/kv_cache.h"

/// Keys and values of one sequence in one block. Not installed.
namespace baseq {

class BlockCache {
 public:
  virtual ~BlockCache() = default;

  /// Makes room for this many tokens in all; what is there stays.
  virtual void reserve(int64_t tokens) = 0;
  /// Stores keys and values of the tokens from position `length` on, and attends to all up to them.
  /// @param q [tokens, num_heads, head_dim] after RoPE
  /// @param k, v [tokens, num_kv_heads, head_dim], k after RoPE
  /// Returns [tokens, num_heads * head_dim].
  virtual Tensor attend(const Attention& attention, int64_t length, const Tensor& q, const Tensor& k,
                        const Tensor& v) = 0;
  virtual int64_t bytes() const = 0;
};

std::unique_ptr<BlockCache> make_block_cache(const ModelConfig& config, const CacheFormat& format);

}  // namespace baseq
