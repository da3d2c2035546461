#pragma once

#include <cstdint>

#include "baseq/tensor.h"

namespace baseq {

/// One step of Cayley SGD (arXiv 2002.01113, Algorithm 1; of SpinQuant, arXiv 2405.16406) on orthogonal matrices, one
/// by one: with W = A - A^T, A = V X^T - X X^T V X^T / 2 for X = R^T and V the transposed negative gradient, R^T moves
/// to the Cayley transform (I - a W / 2)^-1 (I + a W / 2) R^T, which five iterations of its fixed point approach. The
/// rate a is at most 1 / |W|_1.
/// @param matrix   [..., n, n], changed in place; orthogonal up to rounding
/// @param gradient of the loss, like `matrix`
void cayley_step(Tensor matrix, const Tensor& gradient, double rate);

/// The nearest orthogonal matrices, in float64: what steps in float32 drifted is taken back.
/// @param matrix [..., n, n]
Tensor nearest_orthogonal(const Tensor& matrix);

}  // namespace baseq
