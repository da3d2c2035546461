#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "attention_kernels.h"
#include "baseq/quant/quantize.h"
#include "integer_kernels.h"

namespace baseq {

/// Keys and values of one key/value head of one sequence, in pages of 64 tokens: as codes with one scale and base a
/// token, or as float16 or float32. Copies share nothing; pages come as tokens do.
///
/// How a decoder layer uses it: one HeadCache for each key/value head of each sequence. After RoPE, transforms and the
/// gain and shift of the cache's quant point (`u = gain * x - shift`; the shift of values is in a bias of the
/// checkpoint, that of keys does not matter to a softmax), append() the new tokens of a head, then attend() with the
/// query heads that share it, whose first query stands at the position length() had before. Prefill in one piece, in
/// chunks of any size, or token by token give the same bits. Threads split heads and sequences: calls for different
/// caches are independent.
class HeadCache {
 public:
  /// @param grid   dynamic, one scale per token, 2 to 8 bits (up to 4 take half a byte, else a byte); none: floats
  /// @param dtype  float16 or float32, of a cache without grid
  /// Throws c10::Error for more than kMaxHeadDim features and for other grids and types.
  HeadCache(int64_t head_dim, const std::optional<QuantSpec>& grid, at::ScalarType dtype = at::kHalf);

  int64_t length() const { return length_; }
  int64_t head_dim() const { return layout_.head_dim; }
  /// Of its pages.
  int64_t bytes() const;
  const CacheLayout& layout() const { return layout_; }
  std::span<const uint8_t* const> pages() const { return {page_starts_.data(), page_starts_.size()}; }

  /// Rows of head_dim() features, `stride` apart.
  struct Rows {
    const float* values = nullptr;
    int64_t stride = 0;
  };
  /// Adds tokens at the end, a row of each.
  /// @param key_clip, value_clip  what remains of a token's range, see compute_qparams
  void append(const Rows& keys, const Rows& values, int64_t tokens, float key_clip = 1, float value_clip = 1);
  /// Forgets the tokens from `length` on. Throws c10::Error when there are fewer.
  void truncate(int64_t length);
  /// What is stored, float32 [length, head_dim] each: for tests and inspection.
  Tensor dequantized_keys() const;
  Tensor dequantized_values() const;

 private:
  void reserve(int64_t tokens);
  void append_codes(const float* token, float clip, bool key);
  void append_floats(const float* token, bool key);
  Tensor dequantized(bool keys) const;
  uint8_t* page(int64_t token) { return storage_[static_cast<size_t>(token / kPageTokens)].get(); }

  struct Free {
    void operator()(uint8_t* page) const;
  };
  CacheLayout layout_;
  std::optional<QuantSpec> grid_;
  int64_t length_ = 0;
  std::vector<std::unique_ptr<uint8_t[], Free>> storage_;
  std::vector<const uint8_t*> page_starts_;
};

/// Attention of query rows over the tokens of one cache.
/// out[q, h] = sum over the tokens that query q sees of softmax(scaling * query . key) * value.
struct AttentionRequest {
  const HeadCache* cache = nullptr;
  const float* queries = nullptr;  ///< query q of head h: queries + q * query_stride + h * head_dim
  float* out = nullptr;            ///< likewise with out_stride
  int64_t rows = 0;                ///< queries
  int64_t heads = 1;               ///< query heads that share this cache, side by side
  int64_t query_stride = 0, out_stride = 0;
  int64_t first_position = 0;  ///< of the first query, which sees the tokens 0 to first_position; the next one more
  int64_t window = 0;          ///< tokens that a query sees, itself included; 0: all before it
  double scaling = 1;
};
/// Throws c10::Error when a query stands behind the last token of its cache. Runs on the calling thread.
void attend(const AttentionRequest& request, const IntegerKernels& kernels);
/// Many of them, split over threads.
void attend(std::span<const AttentionRequest> requests, const IntegerKernels& kernels);

}  // namespace baseq
