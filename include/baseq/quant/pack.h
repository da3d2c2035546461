#pragma once

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

// Words for files and kernels that read compressed-tensors' layout; unpack_* gives back what pack_* was given:
//
//     const Tensor words = pack_to_int32(weight.codes, 4);
//     const Tensor codes = unpack_from_int32(words, 4, weight.codes.size(1));
//
// All throw c10::Error for other shapes and dtypes than said, and num_bits outside 2 to 8.

/// Packs signed codes into int32 words as compressed-tensors 0.18 does: `code + 2^(b-1)` as a dense bit stream along
/// the last dimension, least significant bits first.
/// @param codes int8 [rows, columns]; returns int32 [rows, ceil(columns * num_bits / 32)]
Tensor pack_to_int32(const Tensor& codes, int64_t num_bits);

/// The inverse of pack_to_int32: int8 [rows, columns].
Tensor unpack_from_int32(const Tensor& packed, int64_t num_bits, int64_t columns);

/// Zero points [rows, groups] of any dtype as compressed-tensors stores them, packed along the rows: int32
/// [ceil(rows * num_bits / 32), groups].
Tensor pack_zero_points(const Tensor& zero_points, int64_t num_bits);

/// The inverse of pack_zero_points: float32 [rows, groups].
Tensor unpack_zero_points(const Tensor& packed, int64_t num_bits, int64_t rows);

}  // namespace baseq
#pragma GCC visibility pop
