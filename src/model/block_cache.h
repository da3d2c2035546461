#pragma once

#include <memory>

#include "../integer/attention.h"
#include "baseq/model/decoder.h"
#include "baseq/model/decoder_layer.h"

/// Keys and values of one sequence in one block. Not installed.
namespace baseq {

class BlockCache {
 public:
  virtual ~BlockCache() = default;
  /// Makes room for this many tokens in all; what is there stays.
  virtual void reserve(int64_t tokens) = 0;
  virtual int64_t bytes() const = 0;
};

/// Keeps what the points return as floats.
class FloatBlockCache : public BlockCache {
 public:
  FloatBlockCache(const ModelConfig& config, const CacheFormat& format);

  void reserve(int64_t tokens) override;
  int64_t bytes() const override { return static_cast<int64_t>(keys_.nbytes() + values_.nbytes()); }
  /// Stores keys and values of the tokens from position `length` on, and attends to all up to them.
  /// @param q [tokens, num_heads, head_dim] after RoPE
  /// @param k, v [tokens, num_kv_heads, head_dim], k after RoPE
  /// Returns [tokens, num_heads * head_dim].
  Tensor attend(const Attention& attention, int64_t length, const Tensor& q, const Tensor& k, const Tensor& v);

 private:
  Tensor keys_, values_;  ///< [num_kv_heads, room, head_dim]
};

/// Keeps pages of codes or float16, to which attention is defined to the bit: docs/arithmetic.md.
class PagedBlockCache : public BlockCache {
 public:
  PagedBlockCache(int64_t num_kv_heads, int64_t head_dim, const std::optional<QuantSpec>& grid, at::ScalarType stored);

  void reserve(int64_t) override {}  // pages come with their tokens
  int64_t bytes() const override;
  std::vector<HeadCache>& heads() { return heads_; }

 private:
  std::vector<HeadCache> heads_;
};

/// Rows of a sequence among those of a forward pass.
struct PagedRows {
  PagedBlockCache* cache;
  int64_t length;       ///< tokens before these
  int64_t first, rows;  ///< in q, k and v
};
/// Stores keys and values behind the tokens of each sequence, and attends to all up to them.
/// @param q float32 [rows, num_heads * head_dim] after RoPE
/// @param k, v float32 [rows, num_kv_heads * head_dim], k after RoPE
/// Returns [rows, num_heads * head_dim].
Tensor attend_pages(const Attention& attention, const std::vector<PagedRows>& sequences, const Tensor& q,
                    const Tensor& k, const Tensor& v);

/// The grid of an attention's cache, if there is one.
std::optional<QuantSpec> cache_grid(const Attention& attention);

}  // namespace baseq
