#pragma once

#include <cstdint>

#include "baseq/tensor.h"
#include "integer_kernels.h"

/// The float steps between quantized linears, row by row in the order of docs/arithmetic.md: the same bits for any
/// instruction set, threads and rows beside a row. Rows may be columns of a wider matrix. No gradients: for prepared
/// layers. The Hadamard transform (baseq/transform/hadamard.h) is defined in the same way.
namespace baseq {

/// x / sqrt(mean(x^2) + eps) * weight over the last dimension. float32, contiguous result.
/// @param weight  float32 [features]
Tensor rms_norm_rows(const Tensor& x, const Tensor& weight, double eps, const IntegerKernels& kernels);

/// gain * x - shift, each rounded on its own, over the last dimension; x itself where neither is defined.
/// @param gain, shift  float32 [features] or undefined
Tensor gain_and_shift_rows(const Tensor& x, const Tensor& gain, const Tensor& shift);

/// x + y, of one shape.
Tensor sum_of_rows(const Tensor& x, const Tensor& y);

/// silu(gate) * up, times `factor` [features] where it is defined. float32 of one shape.
Tensor silu_product_rows(const Tensor& gate, const Tensor& up, const Tensor& factor, const IntegerKernels& kernels);

/// Turns feature i of the first half and of the second half of the first 2 * half features of each head by one angle:
/// `a cos - b sin` and `b cos + a sin`, products rounded before they are added, as ATen's operations do.
/// @param x    float32 [rows, heads, head_dim], changed in place; the heads of a row are side by side
/// @param cos, sin  float32 [rows, half]
void rope_rows(Tensor& x, const Tensor& cos, const Tensor& sin, const IntegerKernels& kernels);

}  // namespace baseq
