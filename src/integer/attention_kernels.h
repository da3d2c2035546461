#pragma once

#include <cstdint>

/// Attention of query rows over the cached keys and values of one head. docs/arithmetic.md defines the results to the
/// bit. Plain pointers, so that the kernels compile without LibTorch.
namespace baseq {

/// Tokens of a page: what one step of the softmax takes.
constexpr int64_t kPageTokens = 64;
/// Query rows, heads counted, that walk the pages together.
constexpr int64_t kQueryRows = 96;

/// Features of a head, at most: sums of 15-bit queries with 8-bit codes are below 2^31.
constexpr int64_t kMaxHeadDim = 512;

/// How a page stores a feature of a key or value.
enum class CachedType : uint8_t { kNibbles, kBytes, kHalf, kFloat };

/// A page: keys, then values, then, of quantized caches, scales and bases of keys and of values, float32 [64] each.
/// Keys lie with tokens side by side, so that a register holds one feature or two of many tokens: nibbles
/// [features / 4, 64, 2], feature 4 q + i in nibble i / 2 of byte i % 2; bytes [features / 2, 64, 2]; values of float
/// caches [features, 64]. Values lie with the features of a token side by side: nibbles [64, features / 32, 16],
/// feature 32 q + i in nibble i / 16 of byte i % 16; everything else [64, features].
struct CacheLayout {
  int64_t head_dim = 0;
  CachedType type = CachedType::kNibbles;

  bool quantized() const { return type == CachedType::kNibbles || type == CachedType::kBytes; }
  /// Features with their padding, whose codes are 0.
  int64_t features() const { return (head_dim + 31) / 32 * 32; }
  int64_t matrix_bytes() const {
    const int64_t values = features() * kPageTokens;
    return type == CachedType::kNibbles ? values / 2
           : type == CachedType::kBytes ? values
           : type == CachedType::kHalf  ? values * 2
                                        : values * 4;
  }
  int64_t page_bytes() const { return 2 * matrix_bytes() + (quantized() ? 4 * kPageTokens * 4 : 0); }
};

/// Query rows of one sequence with the heads that share a key/value head. Row i is query i / heads of head i % heads.
struct AttentionRows {
  CacheLayout layout;
  const uint8_t* const* pages = nullptr;
  int64_t queries = 0, heads = 1;
  /// Query q of head h starts at query_values + q * query_stride + h * head_dim, its result likewise.
  const float* query_values = nullptr;
  float* out = nullptr;
  int64_t query_stride = 0, out_stride = 0;
  int64_t first_position = 0;  ///< of the first query: it sees the tokens up to this one
  int64_t window = 0;          ///< tokens that a query sees, itself included; 0: all
  float scaling = 1;           ///< of the softmax
};

/// Rows of a task that walk the pages together, with room for whole registers.
constexpr int64_t rows_of_block(const AttentionRows& task) {
  const int64_t rows = (task.queries * task.heads + 15) / 16 * 16;
  return rows < kQueryRows ? rows : kQueryRows;
}
/// Bytes of the memory that attend() needs, at a multiple of 64 bytes.
int64_t attention_scratch_bytes(const AttentionRows& task);

}  // namespace baseq
