#pragma once

#include "prepared_linear.h"

namespace baseq {

/// A linear that is not quantized, such as the head, in panels: float products whose sums have the order that
/// docs/arithmetic.md gives ("Low-rank corrections"). A row of the result depends neither on the other rows, the
/// threads nor the instruction set.
class FloatLinear {
 public:
  /// @param weight [out_features, in_features], float32, float16 or bfloat16: kept in its type
  /// @param bias   optional [out_features]
  explicit FloatLinear(const Tensor& weight, const Tensor& bias = {});

  /// @param x float32 [rows, in_features]
  /// Returns float32 [rows, out_features].
  Tensor forward(const Tensor& x, const IntegerKernels& kernels = integer_kernels()) const;

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }
  int64_t bytes() const;

 private:
  int64_t in_features_, out_features_;
  Tensor panels_;  ///< [out_features / 16, padded in_features, 16]
  Tensor bias_;    ///< float32 [out_features] or undefined
};

}  // namespace baseq
