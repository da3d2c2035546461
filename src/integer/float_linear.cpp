#include "float_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace baseq {
namespace {

/// Rows at a time: their values stay in a cache while the panels pass.
constexpr int64_t kRowsPerPass = 64;
/// Columns of the kernels' four chains.
constexpr int64_t kChains = 4;

StoredType float_type(at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "FloatLinear: the weight is ", dtype,
              ", expected float32, float16 or bfloat16");
  return dtype == at::kFloat ? StoredType::kFloat : dtype == at::kHalf ? StoredType::kHalf : StoredType::kBFloat16;
}

}  // namespace

FloatLinear::FloatLinear(const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.device().is_cpu() && weight.numel() > 0, "FloatLinear: the weight is ",
              weight.sizes(), ", expected [out_features, in_features] on the CPU");
  float_type(weight.scalar_type());
  out_features_ = weight.size(0);
  in_features_ = weight.size(1);
  const int64_t columns = (in_features_ + kChains - 1) / kChains * kChains;
  const int64_t panels = (out_features_ + kPanelRows - 1) / kPanelRows;
  panels_ = at::zeros({panels, columns, kPanelRows}, weight.options());
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * kPanelRows, rows = std::min(kPanelRows, out_features_ - first);
    panels_[panel].narrow(0, 0, in_features_).narrow(1, 0, rows).copy_(weight.narrow(0, first, rows).t());
  }
  if (!bias.defined()) return;
  TORCH_CHECK(bias.sizes() == at::IntArrayRef({out_features_}), "FloatLinear: bias is ", bias.sizes(), ", expected [",
              out_features_, "]");
  bias_ = bias.to(at::kFloat);
}

Tensor FloatLinear::forward(const Tensor& x, const IntegerKernels& kernels) const {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == in_features_ && x.scalar_type() == at::kFloat, "FloatLinear: x is ",
              x.scalar_type(), " ", x.sizes(), ", expected float32 [rows, ", in_features_, "]");
  const int64_t rows = x.size(0), columns = panels_.size(1), width = panels_.size(0) * kPanelRows;
  const Tensor values =
      (columns == in_features_ ? x : at::constant_pad_nd(x, {0, columns - in_features_})).contiguous();
  const Tensor y = at::empty({rows, out_features_}, at::kFloat);
  const StoredType type = float_type(panels_.scalar_type());
  const auto* stored = static_cast<const char*>(panels_.const_data_ptr());
  const int64_t panel_bytes = columns * kPanelRows * bytes_of(type);
  const auto* in = values.const_data_ptr<float>();
  auto* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, panels_.size(0), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kRowsPerPass * kPanelRows];
    for (int64_t first = 0; first < rows; first += kRowsPerPass) {
      const int64_t count = std::min(kRowsPerPass, rows - first);
      for (int64_t panel = begin; panel < end; ++panel) {
        const FactorPanels factors{stored + panel * panel_bytes, type, 1, columns};
        kernels.project(factors, in + first * columns, count, sums);
        const int64_t kept = std::min(kPanelRows, out_features_ - panel * kPanelRows);
        for (int64_t row = 0; row < count; ++row) {
          std::copy_n(sums + row * kPanelRows, kept, out + (first + row) * out_features_ + panel * kPanelRows);
        }
      }
    }
  });
  TORCH_INTERNAL_ASSERT(width >= out_features_);
  if (bias_.defined()) y.add_(bias_);
  return y;
}

int64_t FloatLinear::bytes() const {
  return static_cast<int64_t>(panels_.nbytes() + (bias_.defined() ? bias_.nbytes() : 0));
}

}  // namespace baseq
