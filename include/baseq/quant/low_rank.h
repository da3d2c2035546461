#pragma once

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// A correction B A beside a rounded weight, W ~ W_q + B A, float64.
struct LowRankCorrection {
  Tensor A;            ///< [r, in_features]
  Tensor B;            ///< [out_features, r], orthonormal columns
  double removed = 0;  ///< tr(E R E^T) - tr((E - B A) R (E - B A)^T)
};

/// The B A of rank r <= `rank` with the least tr((E - B A) R (E - B A)^T): the columns of B are the eigenvectors of
/// E R E^T with the largest eigenvalues, A = B^T E, and what remains is the sum of the other eigenvalues. That is
/// Theorem 1 of QERA (arXiv 2410.06040) without a root or an inverse of R, which may be singular.
/// @param error   E = W - W_q, [out_features, in_features]
/// @param moments R: undefined for the identity (the truncated SVD of E, arXiv 2303.08302); [in_features] for a
///                diagonal matrix (variances: QERA-approx; squared mean magnitudes: L2QER, arXiv 2402.02446);
///                [in_features, in_features] for the inputs' second moments E[x^T x] (QERA-exact)
/// Where both sides of a large error are long, the eigenvectors come from a block Krylov iteration, which ends when a
/// step adds less than 1e-5 to what is removed. Throws c10::Error when shapes do not fit, rank is not positive, or a
/// value is not finite.
LowRankCorrection reconstruct_error(const Tensor& error, const Tensor& moments, int64_t rank);

/// The two thin matrices of a correction as a checkpoint stores them.
///
///     const LowRankCorrection best = reconstruct_error(w - rounded.dequantized(), second_moments(x), 16);
///     const LowRankFactors lora = store_factors(best.A, best.B, at::kBFloat16);
///     const Tensor corrected = rounded.dequantized() + lora.product();
struct LowRankFactors {
  Tensor A{};                   ///< [r, in_features], float32, float16, bfloat16, or int8 codes
  Tensor B{};                   ///< [out_features, r], the same type
  Tensor A_scale{}, B_scale{};  ///< float32 [r, 1] and [1, r]: steps of int8 codes, else undefined

  bool defined() const { return A.defined(); }
  Tensor dequantized_A() const;  ///< float32
  Tensor dequantized_B() const;  ///< float32
  Tensor product() const;        ///< B A, float32 [out_features, in_features]
};

/// `A` and `B` rounded to `dtype`; at::kChar: to the nearest of 256 values, with a scale for each row of A and each
/// column of B (ZeroQuant-V2, arXiv 2303.08302, keeps factors in 8 bits).
LowRankFactors store_factors(const Tensor& A, const Tensor& B, at::ScalarType dtype);

}  // namespace baseq
#pragma GCC visibility pop
