#pragma once

#include <cstdint>
#include <vector>

#include "baseq/tensor.h"

/// Matrix products of 8-bit codes with sums of int32.
namespace baseq {

/// Whether the processor multiplies and adds four unsigned codes by four signed ones at once (AVX-512 VNNI).
bool has_vnni();

/// Weights in the order that the products read them.
class Int8Weights {
 public:
  /// @param codes  int8 `[products, columns, depth]`
  /// @param vnni   by AVX-512 VNNI; else widened to int16
  Int8Weights(const Tensor& codes, bool vnni);

  /// out[p] = (a[p] - 128) codes[p]^T for a `[products, rows, depth]`, out `[products, rows, columns]`. Reads up to
  /// three bytes beyond `a`. Sums of more than 2^31 / 2^15 codes may overflow.
  void multiply(const uint8_t* a, int64_t rows, int32_t* out) const;

 private:
  int64_t products_, columns_, depth_;
  std::vector<int8_t> packed_;  ///< VNNI: [products, columns / 16, depth / 4, 16, 4], both rounded up with zeros
  std::vector<int32_t> start_;  ///< VNNI: [products, columns rounded up], -128 times the sum of a column's codes
  Tensor wide_;                 ///< otherwise: int16 [products, columns, depth]
};

}  // namespace baseq
