#include "rows.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

namespace baseq {
namespace {

constexpr int64_t kValuesOfTask = 1 << 14;

void check_floats(const char* who, const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() >= 1, who,
              ": expected float32 on the CPU, not ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

/// StridedRows that lie `stride` apart.
struct StridedRows {
  Tensor values;
  int64_t count = 0, features = 0, stride = 0;

  const float* row(int64_t index) const { return values.const_data_ptr<float>() + index * stride; }
};
/// The rows of x where they are, such as columns of a wider matrix, or a copy of them.
StridedRows strided_rows(const char* who, const Tensor& x) {
  check_floats(who, x);
  const int64_t features = x.size(-1), count = features == 0 ? 0 : x.numel() / features;
  bool in_place = features <= 1 || x.stride(-1) == 1;
  int64_t stride = 0, rows = 1;  // of the dimensions so far, the last ones first
  for (int64_t d = x.dim() - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) stride = x.stride(d);
    in_place = in_place && x.stride(d) == rows * stride;
    rows *= x.size(d);
  }
  if (!in_place) return {x.contiguous(), count, features, features};
  return {x, count, features, rows == 1 ? features : stride};
}

Tensor new_rows(const Tensor& like) { return at::detail::empty_cpu(like.sizes(), at::kFloat); }

/// fn(row) for `rows` rows of `features`.
template <class Fn>
void for_each_row_of(int64_t rows, int64_t features, const Fn& fn) {
  at::parallel_for(0, rows, 1 + kValuesOfTask / std::max<int64_t>(features, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fn(row);
  });
}

/// A vector with a value for each feature, or null.
const float* vector_of(const char* who, const Tensor& vector, int64_t features) {
  if (!vector.defined()) return nullptr;
  TORCH_CHECK(vector.scalar_type() == at::kFloat && vector.numel() == features && vector.is_contiguous(), who,
              ": a vector is ", vector.scalar_type(), " ", vector.sizes(), ", expected contiguous float32 [", features,
              "]");
  return vector.const_data_ptr<float>();
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void scale_and_shift(const float* x, const float* gain,
                                                                                  const float* shift, int64_t n,
                                                                                  float* y) {
  if (gain == nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] - shift[i];
  } else if (shift == nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * gain[i];
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * gain[i] - shift[i];
  }
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void add_row(const float* x, const float* y, int64_t n,
                                                                          float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] = x[i] + y[i];
}

}  // namespace

Tensor rms_norm_rows(const Tensor& x, const Tensor& weight, double eps, const IntegerKernels& kernels) {
  const StridedRows rows = strided_rows("rms_norm_rows", x);
  const float* gain = vector_of("rms_norm_rows", weight, rows.features);
  Tensor y = new_rows(x);
  auto* out = y.mutable_data_ptr<float>();
  for_each_row_of(rows.count, rows.features, [&](int64_t row) {
    kernels.rms_norm(rows.row(row), gain, static_cast<float>(eps), rows.features, out + row * rows.features);
  });
  return y;
}

Tensor silu_product_rows(const Tensor& gate, const Tensor& up, const Tensor& factor, const IntegerKernels& kernels) {
  const StridedRows gates = strided_rows("silu_product_rows", gate), ups = strided_rows("silu_product_rows", up);
  TORCH_CHECK(up.sizes() == gate.sizes(), "silu_product_rows: up is ", up.sizes(), " but gate is ", gate.sizes());
  const float* scale = vector_of("silu_product_rows", factor, gates.features);
  Tensor y = new_rows(gate);
  auto* out = y.mutable_data_ptr<float>();
  for_each_row_of(gates.count, gates.features, [&](int64_t row) {
    kernels.silu_product(gates.row(row), ups.row(row), scale, gates.features, out + row * gates.features);
  });
  return y;
}

Tensor gain_and_shift_rows(const Tensor& x, const Tensor& gain, const Tensor& shift) {
  const StridedRows rows = strided_rows("gain_and_shift_rows", x);
  const float* gains = vector_of("gain_and_shift_rows", gain, rows.features);
  const float* shifts = vector_of("gain_and_shift_rows", shift, rows.features);
  if (gains == nullptr && shifts == nullptr) return x;
  Tensor y = new_rows(x);
  auto* out = y.mutable_data_ptr<float>();
  for_each_row_of(rows.count, rows.features, [&](int64_t row) {
    scale_and_shift(rows.row(row), gains, shifts, rows.features, out + row * rows.features);
  });
  return y;
}

Tensor sum_of_rows(const Tensor& x, const Tensor& y) {
  const StridedRows first = strided_rows("sum_of_rows", x), second = strided_rows("sum_of_rows", y);
  TORCH_CHECK(x.sizes() == y.sizes(), "sum_of_rows: x is ", x.sizes(), " but y is ", y.sizes());
  Tensor sum = new_rows(x);
  auto* out = sum.mutable_data_ptr<float>();
  for_each_row_of(first.count, first.features, [&](int64_t row) {
    add_row(first.row(row), second.row(row), first.features, out + row * first.features);
  });
  return sum;
}

void rope_rows(Tensor& x, const Tensor& cos, const Tensor& sin, const IntegerKernels& kernels) {
  check_floats("rope_rows", x);
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2)), "rope_rows: x is ",
              x.sizes(), " with strides ", x.strides(), ", expected [rows, heads, head_dim] with rows in one piece");
  const int64_t rows = x.size(0), heads = x.size(1), head_dim = x.size(2), stride = x.stride(0);
  TORCH_CHECK(cos.dim() == 2 && cos.size(0) == rows && 2 * cos.size(1) <= head_dim && sin.sizes() == cos.sizes(),
              "rope_rows: cos is ", cos.sizes(), " and sin ", sin.sizes(), " for x ", x.sizes());
  const StridedRows cosines = strided_rows("rope_rows", cos), sines = strided_rows("rope_rows", sin);
  auto* values = x.mutable_data_ptr<float>();
  for_each_row_of(rows, heads * head_dim, [&](int64_t row) {
    for (int64_t head = 0; head < heads; ++head) {
      kernels.rope(values + row * stride + head * head_dim, cosines.row(row), sines.row(row), cos.size(1));
    }
  });
}

}  // namespace baseq
