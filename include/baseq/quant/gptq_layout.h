#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// Which number `qzeros` of a GPTQ checkpoint holds for an unsigned zero point z: "gptq" z - 1, "gptq_v2" z.
enum class GptqVersion { kV1, kV2 };

/// `qweight` of GPTQ checkpoints (arXiv 2210.17323): `code + 2^(b-1)` as a dense bit stream along the inputs, least
/// significant bits first. For 3 bits these are the words of the layout with 10, 11 and 11 values in three words.
/// @param codes int8 [out_features, in_features]; returns int32 [in_features * num_bits / 32, out_features]. Throws
///              c10::Error when the inputs do not fill the last word.
Tensor pack_gptq_codes(const Tensor& codes, int64_t num_bits);

/// The inverse of pack_gptq_codes: int8 [out_features, in_features].
Tensor unpack_gptq_codes(const Tensor& qweight, int64_t num_bits);

/// `qzeros`: zero points packed along the outputs.
/// @param zero_point [out_features, groups], signed like the codes; returns int32 [groups, out_features * num_bits /
///                   32]. Throws when the outputs do not fill the last word, and in version 1 for the lowest zero
///                   point, whose z - 1 does not exist.
Tensor pack_gptq_zero_points(const Tensor& zero_point, int64_t num_bits, GptqVersion version);

/// The inverse of pack_gptq_zero_points: float32 [out_features, groups].
Tensor unpack_gptq_zero_points(const Tensor& qzeros, int64_t num_bits, GptqVersion version);

/// `qweight` of AWQ checkpoints, version "gemm" (arXiv 2306.00978): 4 bits, `code + 8`, eight outputs in a word in the
/// order 0, 2, 4, 6, 1, 3, 5, 7 from the least significant bits.
/// @param codes int8 [out_features, in_features]; returns int32 [in_features, out_features / 8]. Throws unless 8
/// divides
///              the outputs.
Tensor pack_awq_codes(const Tensor& codes);

/// The inverse of pack_awq_codes: int8 [out_features, in_features].
Tensor unpack_awq_codes(const Tensor& qweight);

/// `qzeros` of AWQ checkpoints: [out_features, groups], signed like the codes -> int32 [groups, out_features / 8].
Tensor pack_awq_zero_points(const Tensor& zero_point);

/// The inverse of pack_awq_zero_points: float32 [out_features, groups].
Tensor unpack_awq_zero_points(const Tensor& qzeros);

}  // namespace baseq
