#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// x W^T + b as at::linear computes it. Float32 products on the CPU that need no gradient go to oneDNN: LibTorch gives
/// them to MKL, which reaches less than half of an AMD processor's speed.
/// @param x      [..., in_features]
/// @param weight [out_features, in_features]
/// @param bias   [out_features] or undefined
Tensor linear_product(const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// a b of two matrices, the same way.
Tensor matrix_product(const Tensor& a, const Tensor& b);

/// a^T b where it is symmetric, as with b = diag a: little more than half of its products.
/// @param a, b [tokens, features]
Tensor symmetric_product(const Tensor& a, const Tensor& b);

}  // namespace baseq
