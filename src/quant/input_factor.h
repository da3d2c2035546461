#pragma once

#include "baseq/quant/gptq.h"

namespace baseq {

/// What GPTQ takes from the inputs of a linear. All linears that read the same input share it. All is on the device of
/// the moments or tokens that it was computed from.
///
/// With rows and columns in the order in which columns are rounded, H + A = R R^T: H are the second moments of the
/// inputs, A is diagonal, R upper triangular. GPTQ's feedback needs no more. With the inverse of H + A factored as
/// U^T U, U = R^-1, GPTQ subtracts (w_i - q_i) U_ij / U_ii from column j, where w_i carries all earlier corrections. In
/// terms of the *original* weights w^0 that is w_j = w^0_j + sum over i < j of (w^0_i - q_i) R_ij / R_jj (the
/// equivalence of LDLQ with GPTQ, arXiv 2307.13304, Theorem 6): the matrix is factored once and never inverted.
struct InputFactor {
  Tensor order;        ///< int64 [columns], where each column stands in the weight
  Tensor pivots;       ///< R_jj^2, float32 [columns]; undefined: there is no usable factor
  Tensor added;        ///< the diagonal of A, float32 [columns]: the damping, and a one on inputs that are always zero
  double damping = 0;  ///< what was used in the end
  Tensor moments;      ///< H, float64 [columns, columns], not ordered; undefined when not finite, or in the token form
  // R_ij / R_jj, what an error in column i does to a later column j, float32, in one of two forms.
  Tensor feedback;           ///< [columns, columns], row j for the columns i < j; the rest has no meaning
  Tensor tokens, responses;  ///< [num_tokens, columns] and [columns, num_tokens]: responses_j . tokens_i
  Tensor correction;         ///< [columns, columns], see GptqOptions::cross_strength; undefined without `cross`

  bool defined() const { return pivots.defined(); }
};

/// @param moments float64 [columns, columns]
/// @param cross   see gptq(); undefined: none
InputFactor factor_moments(const Tensor& moments, const GptqOptions& options, const Tensor& cross = {});

/// Whether factor_tokens costs less than factor_moments and the rounding after it.
bool few_tokens(int64_t num_tokens, int64_t columns, const GptqOptions& options);

/// The factor of H = x^T x for fewer tokens than columns, without a matrix of [columns, columns].
/// @param x float32 [num_tokens, columns]; the damping must be positive
InputFactor factor_tokens(const Tensor& x, const GptqOptions& options);

/// See the other gptq().
GptqResult gptq(const Tensor& weight, const InputFactor& inputs, const QuantSpec& spec, const GptqOptions& options);

// For the implementations.

/// Sets `order` and `added`, for the damping that `factor` has, from the diagonal of H in the order of the weight.
/// Returns the diagonal of H + A in the order of rounding.
Tensor damp(InputFactor& factor, const Tensor& diagonal, const GptqOptions& options);

/// Upper triangular R with A = R R^T, float64.
struct UpperFactor {
  Tensor matrix;
  Tensor usable;  ///< bool []: whether A has one
};
UpperFactor upper_factor(const Tensor& matrix);

/// What has to hold on the way to a factor. On the CPU one can stop where it does not; on other devices looking there
/// would wait for all that was asked for, so that it is looked at in the end.
class Conditions {
 public:
  /// @param condition bool []
  /// Returns false when it is known that it does not hold.
  bool add(const Tensor& condition);
  bool all_hold() const;

 private:
  Tensor all_;
};

/// Whether every pivot of a Cholesky factor says something: a pivot is what is left of a diagonal value when the
/// columns before it are known. One that is less than the rounding errors of its own diagonal value comes from them
/// alone, and one that is nothing beside the largest value makes a feedback without bound. Any damping worth the name
/// keeps both away. bool []
Tensor has_usable_pivots(const Tensor& pivots, const Tensor& diagonal);

}  // namespace baseq
