#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// Whether this processor multiplies bfloat16 (AVX512_BF16, AMX) and LibTorch has oneDNN's kernel for it. Its product
/// of tensors (at::linear) rounds the results to bfloat16 as well; those below keep the float32 sums.
bool has_bfloat16_products();

/// A matrix rounded to bfloat16 as the factor of a product, its rows one after the other and filled up with zeros.
/// @param matrix [..., depth], float32 on the CPU
Tensor bfloat16_factor(const Tensor& matrix);

/// a b^T, float32 [rows of a, rows of b]. The same bits for every number of threads.
/// @param a, b what bfloat16_factor() returned for matrices of the same depth
Tensor bfloat16_product(const Tensor& a, const Tensor& b);

/// a a^T in little more than half of the products, exactly symmetric outside of blocks of 128 rows.
Tensor bfloat16_square(const Tensor& a);

}  // namespace baseq
