#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// The order of the largest Hadamard matrix that divides n in the sense of hadamard_transform: n itself when a
/// construction is known (Sylvester, Paley I and II over prime and prime-power fields, Williamson, and Kronecker
/// products of these), else the largest divisor of n that has one.
int64_t hadamard_block_size(int64_t n);

/// H / sqrt(n), float64 [n, n], orthogonal; deterministic. Throws c10::Error when hadamard_block_size(n) != n.
Tensor hadamard_matrix(int64_t n);

/// x H / sqrt(n) along the last dimension, block-diagonal with blocks of hadamard_block_size(n), in O(n log n) for the
/// power-of-two part. `transpose` applies H^T, the inverse. Differentiable; keeps dtype and device.
Tensor hadamard_transform(const Tensor& x, bool transpose = false);

}  // namespace baseq
