#pragma once

#include "baseq/quant/quantize.h"

namespace baseq {

/// HQQ's constants.
struct HalfQuadratic {
  double norm = 0.7;     ///< p of the error sum |x - fake_quantize(x)|^p
  double strength = 10;  ///< beta of the first iteration
  double growth = 1.01;  ///< of beta
  int64_t num_iterations = 20;
};

/// The grid of each group by half-quadratic splitting (HQQ, https://mobiusml.github.io/hqq_blog): from the grid that
/// covers everything, e = shrink_p(x - Q(x)) and the grid that is least squares for Q(x) at x - e take turns. The
/// result is the grid with the least error of all of them, group by group. Looks at no inputs.
///
/// Two things differ from the published method. Residuals count in steps of the grid, so that a weight and twice the
/// weight have the same codes: with its constants the published shrinkage sets every residual below 0.17 to zero,
/// whatever the unit. And zero points are integers here, so the scale is fitted as well; on a symmetric grid it alone.
/// @param spec a static grid
/// Throws c10::Error when the grid is one of activations.
QParams half_quadratic_qparams(const Tensor& x, const QuantSpec& spec, const HalfQuadratic& options = {});

}  // namespace baseq
