#pragma once

#include "baseq/quant/quantize.h"

namespace baseq {

/// What lies in the cells of a grid: all values that have the same code.

/// `scale` as its type stores it and not below the smallest one. The gradient passes the rounding.
Tensor round_scale(const Tensor& scale, const QuantSpec& spec);
/// `zero_point` of a static grid as an integer code. The gradient passes the rounding.
Tensor round_zero_point(const Tensor& zero_point, const QuantSpec& spec);

/// `steps`, [out_features, in_features], times the scale of each group; differentiable.
Tensor in_units_of(const Tensor& steps, const Tensor& scale, const QuantSpec& spec);

/// The weight next to `weight` whose round to nearest is `rounded`: `weight` itself where that has the same code
/// already, else a value inside the cell of the code, close to the border with the cell of `weight`.
Tensor nearest_in_cells(const Tensor& weight, const QuantizedWeight& rounded);

}  // namespace baseq
