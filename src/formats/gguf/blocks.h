#pragma once

#include <cstdint>
#include <vector>

#include "baseq/tensor.h"

/// The blocks in which ggml stores numbers. Not installed.
namespace baseq {

/// ggml's tensor types that this program knows, by their numbers.
enum class GgufType : uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ6_K = 14, kBF16 = 30 };

/// Throws c10::Error for a type that is not one of GgufType.
const char* gguf_type_name(GgufType type);
/// Elements and bytes of a block; a float type's block is one element.
int64_t gguf_block_size(GgufType type);
int64_t gguf_block_bytes(GgufType type);
/// Of a tensor. Throws when the blocks do not divide the last dimension.
int64_t gguf_num_bytes(GgufType type, const std::vector<int64_t>& shape);

/// Blocks of ggml, uint8 [rows, blocks * block bytes]. `codes` int8 [rows, columns]; `scale`, `zero_point` float32
/// [rows, groups] with groups of a multiple of 32 columns; kQ4_1 takes a zero point (undefined: 0), kQ8_0 and kQ4_0
/// none. Other types are not written.
Tensor gguf_blocks(GgufType type, const Tensor& codes, const Tensor& scale, const Tensor& zero_point);

/// Codes int8 [rows, columns] of symmetric blocks, kQ8_0 or kQ4_0, and their scales float16 [rows, columns / 32].
Tensor gguf_codes(GgufType type, const Tensor& bytes, const std::vector<int64_t>& shape);
Tensor gguf_scales(GgufType type, const Tensor& bytes, const std::vector<int64_t>& shape);
/// [rows, columns / 32]
std::vector<int64_t> gguf_scales_shape(std::vector<int64_t> shape);

/// kF32, kF16 and kBF16 have values in their own dtype, the others in float32.
at::ScalarType gguf_values_dtype(GgufType type);
/// The values that `bytes` (uint8 [gguf_num_bytes]) stand for, of that shape.
Tensor gguf_values(GgufType type, const Tensor& bytes, const std::vector<int64_t>& shape);

}  // namespace baseq
