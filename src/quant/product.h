#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// x W^T + b as at::linear computes it. Float32 products on the CPU that need no gradient go to oneDNN: LibTorch gives
/// them to MKL, which reaches less than half of an AMD processor's speed.
/// @param x      [..., in_features]
/// @param weight [out_features, in_features]
/// @param bias   [out_features] or undefined
Tensor linear_product(const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// Whether linear_product() rounds these factors to bfloat16: in a MatmulPrecisionScope that says so, of float32 on a
/// CPU that multiplies bfloat16, without gradients. Bias and result stay float32.
bool rounds_factors(const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// linear_product() then, for an x that several weights share.
/// @param factor bfloat16_factor(x)
/// @param sizes  of x
Tensor rounded_linear_product(const Tensor& factor, at::IntArrayRef sizes, const Tensor& weight, const Tensor& bias);

/// a b of two matrices, the same way.
Tensor matrix_product(const Tensor& a, const Tensor& b);

/// a^T b where it is symmetric, as with b = diag a: little more than half of its products.
/// @param a, b [tokens, features]
Tensor symmetric_product(const Tensor& a, const Tensor& b);

/// x^T diag(weights) x, symmetric and positive semidefinite up to its float32 sums, whatever the factors are rounded
/// to.
/// @param x       [tokens, features]
/// @param weights [tokens, 1], not negative; undefined: ones
Tensor moment_product(const Tensor& x, const Tensor& weights);

}  // namespace baseq
