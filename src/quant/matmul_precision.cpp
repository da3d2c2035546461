#include "matmul_precision.h"

#include <ATen/Context.h>

#include <array>
#include <utility>

#include "bfloat16_product.h"

namespace baseq {
namespace {

thread_local MatmulPrecision precision_of_thread = MatmulPrecision::kHighest;

/// Both in the order of the names.
void set_on_cuda(MatmulPrecision precision) {
  static constexpr std::array kNames = {"highest", "high", "medium"};
  at::globalContext().setFloat32MatmulPrecision(kNames.at(static_cast<size_t>(precision)));
}

}  // namespace

MatmulPrecisionScope::MatmulPrecisionScope(MatmulPrecision precision, at::Device device)
    : before_(MatmulPrecisionScope::current()) {
  if (device.is_cuda() && precision != before_) {
    on_cuda_before_ = static_cast<MatmulPrecision>(at::globalContext().float32MatmulPrecision());
    set_on_cuda(precision);
  }
  precision_of_thread = precision;
}

MatmulPrecisionScope::~MatmulPrecisionScope() {
  precision_of_thread = before_;
  if (on_cuda_before_) set_on_cuda(*on_cuda_before_);
}

MatmulPrecision MatmulPrecisionScope::current() { return precision_of_thread; }

at::ScalarType factor_dtype(MatmulPrecision precision, at::Device device) {
  const bool rounds = device.is_cpu() && precision == MatmulPrecision::kMedium && has_bfloat16_products();
  return rounds ? at::kBFloat16 : at::kFloat;
}

}  // namespace baseq
