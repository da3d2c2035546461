#pragma once

#include "baseq/quant/quantize.h"

#pragma GCC visibility push(default)
namespace baseq {

/// Sum of x^T x over calibration tokens: float32 products, float64 sums.
class Hessian {
 public:
  explicit Hessian(int64_t features);
  void add(const Tensor& x);  ///< x: [..., features]
  Tensor mean() const;        ///< [features, features] float64, divided by the tokens seen
  int64_t num_tokens() const { return num_tokens_; }

 private:
  Tensor sum_;
  int64_t num_tokens_ = 0;
};

/// E[x^T x] of inputs [..., features] that are all at hand, float64 [features, features]: what gptq(),
/// reconstruct_error() and fbquant() take. Hessian takes them in parts.
///
///     const GptqResult result = gptq(weight, second_moments(inputs), {.num_bits = 4});
///     weight - result.weight.dequantized();
Tensor second_moments(const Tensor& x);

struct GptqOptions {
  int64_t block_size = 128;
  double damping = 0.01;         ///< share of the mean diagonal of live inputs; grows tenfold when the factor fails
  bool activation_order = true;  ///< columns in order of falling Hessian diagonal
  bool static_groups = true;     ///< group scales from the original weight (needed with activation_order)
  bool mse_clip = true;          ///< search_qparams instead of compute_qparams
  MseSearch search{};
  double cross_strength = 0.25;  ///< how much of `cross` is made up for; 1 is the optimum for the calibration data
  /// FOEM's beta (arXiv 2507.11017): before a column is rounded, this share of its distance from the original weights
  /// is taken back, and so is what its error tells later columns of that distance. 0: GPTQ.
  double first_order = 0;
};

struct GptqResult {
  QuantizedWeight weight{};
  double relative_error = 0;      ///< of squares: tr(D H D^T) / tr(W H W^T), D = W - dequantized
  double damping = 0;             ///< what was used in the end
  bool fell_back_to_rtn = false;  ///< the Hessian had no usable Cholesky factor at any damping
};

/// tr(M H M^T), float32 products.
/// @param matrix  [rows, features] float32
/// @param hessian [features, features], symmetric
double quadratic_form(const Tensor& matrix, const Tensor& hessian);

/// Round to nearest. Throws c10::Error when the grid is one of activations or a value is not finite.
QuantizedWeight round_to_nearest(const Tensor& weight, const QuantSpec& spec, bool mse_clip = false,
                                 const MseSearch& search = {});

/// GPTQ (arXiv 2210.17323): rounds column by column and lets later columns make up for the error.
/// @param weight   [out_features, in_features], any floating type
/// @param hessian  [in_features, in_features], E[x^T x] of the inputs the quantized layer will see
/// @param cross    optional [in_features, in_features], E[(x_fp - x)^T x]: GPTAQ's asymmetric term (arXiv 2504.02692),
///                 with ResComp's correction (arXiv 2604.07955) that multiplies it with the original weights
/// Throws c10::Error when shapes do not fit, the grid is one of activations, or a weight, the Hessian or `cross` is not
/// finite.
GptqResult gptq(const Tensor& weight, const Tensor& hessian, const QuantSpec& spec, const GptqOptions& options = {},
                const Tensor& cross = {});

}  // namespace baseq
#pragma GCC visibility pop
