#pragma once

#include "baseq/quant/gptq.h"
#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// A correction B A beside a rounded weight, W ~ W_q + B A, float64.
struct LowRankCorrection {
  Tensor A{};          ///< [r, in_features]
  Tensor B{};          ///< [out_features, r], orthonormal columns
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

struct FbquantOptions {
  /// What B A begins with: QERA-exact or the truncated SVD of the error of round to nearest, or B = 0 with a random A.
  enum class Start { kQera, kZero, kSvd };
  Start start = Start::kQera;
  int64_t rank = 16;
  int64_t steps = 200;                   ///< 0: the start
  bool mse_clip = false;                 ///< ratios searched every ten steps; else the grid covers all of W - B A
  MseSearch search{};                    ///< of the clip ratios, over few of them
  double learning_rate = 0.1;            ///< of the first step, in units of the root mean square of A at the start
  at::ScalarType dtype = at::kBFloat16;  ///< of the stored factors, see store_factors
  uint64_t seed = 0;                     ///< of the random A
};

struct FbquantResult {
  QuantizedWeight weight{};   ///< codes of W - B A, rounded to nearest
  LowRankFactors lora{};      ///< as they are stored
  Tensor clip{};              ///< of the grid, [out_features, groups, 1]; undefined without
  double loss_before = 0;     ///< tr(D R D^T) / tr(W R W^T), D = W - (dequantized + B A), at the start
  double relative_error = 0;  ///< the same of what is returned, never above loss_before
};

/// The share of each range of `x` that a grid of these scales covers, [out_features, groups, 1]: with it as `clip`,
/// compute_qparams gives the grid back.
Tensor clip_of(const Tensor& x, const QuantSpec& spec, const Tensor& scale);

/// Codes of W - B A: what its grid covers is within half a step of W beside the correction. A scale that its type
/// rounds down by a share r does not reach the ends of the range: there the error is up to num_steps * r steps more. r
/// is at most 2^-8 for bfloat16 and 2^-11 for float16, and more for a float16 below 6.1e-5, which has fewer bits.
/// @param weight W, float32 [out_features, in_features]
/// @param clip   [out_features, groups, 1], see compute_qparams; undefined: the grid covers everything
QuantizedWeight round_beside(const Tensor& weight, const LowRankFactors& lora, const QuantSpec& spec,
                             const Tensor& clip = {});

/// The same as a float32 weight W_F = Q(W - B A) + B A of factors that are learned: they count as rounded to `dtype`,
/// the gradient reaches them through + B A alone.
Tensor feedback_weight(const Tensor& weight, const Tensor& A, const Tensor& B, const QuantSpec& spec,
                       at::ScalarType dtype, const Tensor& clip = {});

/// FBQuant (arXiv 2501.16385): a correction B A that is taken out before rounding and added back after it,
/// W_F = Q(W - B A) + B A, so that W - W_F is the rounding error of W - B A: at most half a step for any B A, while
/// Q(W) + B A has no bound. With clipping the bound is lost where a weight is clipped, and the error of the whole is
/// less: a grid of few bits that covers everything is coarse. A and B are learned with Adam on tr((W - W_F) R (W -
/// W_F)^T), the grid laid anew over W - B A in every step. Q counts as a constant: a straight-through Q would cancel
/// the gradient of + B A. The factors are rounded to `dtype` in every step, so the best state, which is returned, is
/// the one that is stored.
///
///     const FbquantResult result = fbquant(w, second_moments(x), {.num_bits = 3}, {.rank = 16});
///     const Tensor corrected = result.weight.dequantized() + result.lora.product();
///
/// @param weight  [out_features, in_features], any floating type
/// @param moments R, [in_features, in_features]: E[x^T x] of the inputs, may be singular
/// Throws c10::Error when shapes do not fit or a value is not finite.
FbquantResult fbquant(const Tensor& weight, const Tensor& moments, const QuantSpec& spec,
                      const FbquantOptions& options = {});

}  // namespace baseq
#pragma GCC visibility pop
