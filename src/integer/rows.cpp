#include "rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace baseq {
namespace {

constexpr int64_t kValuesOfTask = 1 << 14;

void check_floats(const char* who, const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() >= 1, who,
              ": expected float32 on the CPU, not ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

/// fn(row) for `rows` rows of `features`.
template <class Fn>
void for_each_row_of(int64_t rows, int64_t features, const Fn& fn) {
  at::parallel_for(0, rows, 1 + kValuesOfTask / std::max<int64_t>(features, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(row);
  });
}

}  // namespace

Tensor rms_norm_rows(const Tensor& x, const Tensor& weight, double eps, const IntegerKernels& kernels) {
  check_floats("rms_norm_rows", x);
  const int64_t features = x.size(-1);
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.sizes() == at::IntArrayRef({features}),
              "rms_norm_rows: the weight is ", weight.scalar_type(), " ", weight.sizes(), ", expected float32 [",
              features, "]");
  const Tensor input = x.contiguous(), gains = weight.contiguous(), y = at::empty_like(input);
  if (input.numel() == 0) return y;
  const float *values = input.const_data_ptr<float>(), *gain = gains.const_data_ptr<float>();
  auto* out = y.mutable_data_ptr<float>();
  for_each_row_of(input.numel() / features, features, [&](int64_t row) {
    kernels.rms_norm(values + row * features, gain, static_cast<float>(eps), features, out + row * features);
  });
  return y;
}

Tensor silu_product_rows(const Tensor& gate, const Tensor& up, const Tensor& factor, const IntegerKernels& kernels) {
  check_floats("silu_product_rows", gate);
  const int64_t features = gate.size(-1);
  TORCH_CHECK(up.scalar_type() == at::kFloat && up.sizes() == gate.sizes(), "silu_product_rows: up is ", up.sizes(),
              " but gate is ", gate.sizes());
  TORCH_CHECK(!factor.defined() || (factor.scalar_type() == at::kFloat && factor.numel() == features),
              "silu_product_rows: the factor is ", factor.sizes(), ", expected float32 [", features, "]");
  const Tensor first = gate.contiguous(), second = up.contiguous(), y = at::empty_like(first);
  if (first.numel() == 0) return y;
  const Tensor factors = factor.defined() ? factor.contiguous() : factor;
  const float* scale = factor.defined() ? factors.const_data_ptr<float>() : nullptr;
  const float *gates = first.const_data_ptr<float>(), *ups = second.const_data_ptr<float>();
  auto* out = y.mutable_data_ptr<float>();
  for_each_row_of(first.numel() / features, features, [&](int64_t row) {
    const int64_t at = row * features;
    kernels.silu_product(gates + at, ups + at, scale, features, out + at);
  });
  return y;
}

void rope_rows(Tensor& x, const Tensor& cos, const Tensor& sin, const IntegerKernels& kernels) {
  check_floats("rope_rows", x);
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "rope_rows: x is ", x.sizes(),
              ", expected contiguous [rows, heads, head_dim]");
  const int64_t rows = x.size(0), heads = x.size(1), head_dim = x.size(2);
  TORCH_CHECK(cos.dim() == 2 && cos.scalar_type() == at::kFloat && cos.size(0) == rows && 2 * cos.size(1) <= head_dim &&
                  sin.sizes() == cos.sizes() && sin.scalar_type() == at::kFloat,
              "rope_rows: cos is ", cos.sizes(), " and sin ", sin.sizes(), " for x ", x.sizes());
  const Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  const int64_t half = cos.size(1);
  const float *c = cosines.const_data_ptr<float>(), *s = sines.const_data_ptr<float>();
  auto* values = x.mutable_data_ptr<float>();
  for_each_row_of(rows, heads * head_dim, [&](int64_t row) {
    for (int64_t head = 0; head < heads; ++head) {
      kernels.rope(values + (row * heads + head) * head_dim, c + row * half, s + row * half, half);
    }
  });
}

}  // namespace baseq
