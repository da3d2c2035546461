#pragma once

#include <optional>

#include "baseq/tensor.h"

namespace baseq {

/// Until its end the products of product.h that this thread asks for have this precision, and on a CUDA device all of
/// LibTorch's products of float32, of every thread. Then what was before holds again, after an exception as well.
class MatmulPrecisionScope {
 public:
  /// Throws c10::Error on a CUDA device whose precision was set through LibTorch's newer and older interface at once.
  MatmulPrecisionScope(MatmulPrecision precision, at::Device device);
  ~MatmulPrecisionScope();
  MatmulPrecisionScope(const MatmulPrecisionScope&) = delete;
  MatmulPrecisionScope& operator=(const MatmulPrecisionScope&) = delete;

  /// What holds for products of this thread; kHighest outside of every scope.
  static MatmulPrecision current();

 private:
  MatmulPrecision before_;
  std::optional<MatmulPrecision> on_cuda_before_;
};

/// What a product of float32 on `device` rounds its factors to under a precision.
at::ScalarType factor_dtype(MatmulPrecision precision, at::Device device);

}  // namespace baseq
