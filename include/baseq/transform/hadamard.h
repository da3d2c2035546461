#pragma once

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The largest divisor of n, n itself where possible, of which a Hadamard matrix can be constructed: Sylvester's powers
/// of two, Paley I and II over prime and prime-power fields up to order 2048, Williamson's 92, 116 and 172, and
/// Kronecker products of these. Covers the sizes of published models and every multiple of 4 below 236 except 156 and
/// 188; 2 for twice an odd number, 1 for an odd one. Throws c10::Error when n < 1.
int64_t hadamard_block_size(int64_t n);

/// H / sqrt(n), float64 [n, n], orthogonal; deterministic. Throws c10::Error when hadamard_block_size(n) != n.
Tensor hadamard_matrix(int64_t n);

/// x H / sqrt(n) along the last dimension with H / sqrt(n) = hadamard_matrix(n), or block-diagonal with blocks
/// hadamard_matrix(hadamard_block_size(n)). `transpose` applies H^T, the inverse.
///
/// n log n for the power of two in n, m / 4 additions per element for each odd-carrying factor of order m. Half types
/// are computed in float32. Differentiable any number of times; keeps dtype, shape and device. On a CPU each row's
/// result is the same bit for bit whatever the number of threads and of rows.
///
///     const Tensor rotated = hadamard_transform(x);             // spreads outliers over all n features
///     const Tensor same = hadamard_transform(rotated, true);    // and back
///
/// @param x  [.., n], floating point; throws c10::Error otherwise
Tensor hadamard_transform(const Tensor& x, bool transpose = false);

}  // namespace baseq
#pragma GCC visibility pop
