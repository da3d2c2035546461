#pragma once

#include "baseq/tensor.h"

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

}  // namespace baseq
