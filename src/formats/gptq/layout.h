#pragma once

#include <cstdint>
#include <vector>

#include "baseq/tensor.h"

/// How GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) checkpoints pack a linear. Not installed.
namespace baseq {

/// The suffixes of its tensors.
inline constexpr const char *kQweight = ".qweight", *kQzeros = ".qzeros", *kScales = ".scales", *kGroupIndex = ".g_idx";

/// The words of one of the tools. Codes and zero points are signed here and unsigned in words: `value + 2^(b-1)`.
/// GPTQ: a dense bit stream along the inputs (zero points: along the outputs), least significant bits first. For 3 bits
/// these are the words of the layout with 10, 11 and 11 values in three words.
/// AWQ, version "gemm": 4 bits, eight outputs per word in the order 0, 2, 4, 6, 1, 3, 5, 7 from the least significant
/// bits.
struct PackedLayout {
  bool awq = false;
  int64_t num_bits = 4;
  /// GPTQ's version 1 stores zero points less one, 2 as they are.
  int64_t version = 1;

  /// int8 [out_features, in_features] -> int32 `qweight`, of qweight_shape. Throws c10::Error unless the numbers fill
  /// the last word.
  Tensor pack_codes(const Tensor& codes) const;
  Tensor unpack_codes(const Tensor& qweight) const;  ///< the inverse
  /// [out_features, groups] -> int32 `qzeros` [groups, words]. Throws as pack_codes, and in version 1 for the lowest
  /// zero point, which has no number below it.
  Tensor pack_zero_points(const Tensor& zero_point) const;
  Tensor unpack_zero_points(const Tensor& qzeros) const;  ///< the inverse, float32
  std::vector<int64_t> qweight_shape(int64_t out_features, int64_t in_features) const;
  std::vector<int64_t> codes_shape(const std::vector<int64_t>& qweight) const;  ///< the inverse
  int64_t per_words(int64_t words) const { return words * 32 / num_bits; }      ///< numbers in so many words

 private:
  Tensor pack(const char* what, const Tensor& values) const;
  Tensor unpack(const Tensor& words) const;
};

}  // namespace baseq
