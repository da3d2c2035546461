#include "baseq/transform/hadamard.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "hadamard_construction.h"
#include "hadamard_kernel.h"
#include "hadamard_ops.h"

namespace baseq {
namespace {

/// Kernels are built once per size and direction; a matrix of order 344 takes milliseconds, a search longer.
std::shared_ptr<const HadamardKernel> kernel_for(int64_t size, bool transpose) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, bool>, std::shared_ptr<const HadamardKernel>> kernels;
  const std::lock_guard lock(mutex);
  auto& kernel = kernels[{size, transpose}];
  if (!kernel) {
    auto built = std::make_shared<HadamardKernel>();
    std::vector<int64_t> orders = hadamard_factors(size);
    built->power_of_two = orders.back();
    orders.pop_back();
    for (const int64_t order : orders) {
      const SignMatrix h = hadamard_signs(order);
      built->factors.emplace_back(transpose ? SignMatrix(h.transpose()) : h);
    }
    built->size = size;
    built->scale = 1.0 / std::sqrt(static_cast<double>(size));
    kernel = std::move(built);
  }
  return kernel;
}

Tensor as_tensor(const SignMatrix& h) {
  return at::from_blob(const_cast<int8_t*>(h.data()), {h.rows(), h.cols()}, at::kChar).to(at::kDouble);
}

/// H / sqrt(order), kept on the device: copying it there would cost more than the product.
Tensor orthogonal_factor(int64_t order, const at::TensorOptions& options) {
  static std::mutex mutex;
  // Never destroyed: at exit a device's allocator may be gone before static objects are.
  static auto& factors = *new std::map<std::tuple<int64_t, std::string, at::ScalarType>, Tensor>;
  const std::lock_guard lock(mutex);
  Tensor& factor = factors[{order, options.device().str(), c10::typeMetaToScalarType(options.dtype())}];
  if (!factor.defined()) {
    factor = (as_tensor(hadamard_signs(order)) / std::sqrt(static_cast<double>(order))).to(options);
  }
  return factor;
}

Tensor transform_on_cpu(const Tensor& x, int64_t block, bool transpose) {
  const at::ScalarType compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor input = x.to(compute).contiguous();
  Tensor output = at::empty_like(input);
  const auto kernel = kernel_for(block, transpose);
  const int64_t rows = input.numel() / block;
  if (compute == at::kDouble) {
    hadamard_rows(input.const_data_ptr<double>(), output.mutable_data_ptr<double>(), rows, *kernel);
  } else {
    hadamard_rows(input.const_data_ptr<float>(), output.mutable_data_ptr<float>(), rows, *kernel);
  }
  return output.to(x.scalar_type());
}

class HadamardFunction : public torch::autograd::Function<HadamardFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, int64_t block, bool transpose) {
    ctx->saved_data["transpose"] = transpose;
    return x.device().is_cpu() ? transform_on_cpu(x, block, transpose) : hadamard_by_products(x, block, transpose);
  }

  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* ctx,
                                               const torch::autograd::tensor_list& grad) {
    return {hadamard_transform(grad[0], !ctx->saved_data["transpose"].toBool()), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor hadamard_by_products(const Tensor& x, int64_t block, bool transpose) {
  // Powers of two are multiplied 32 at a time: a product of that size keeps a GPU as busy as its memory does.
  std::vector<int64_t> orders = hadamard_factors(block);
  int64_t power_of_two = orders.back();
  orders.pop_back();
  for (; power_of_two > 1; power_of_two /= orders.back()) orders.push_back(std::min<int64_t>(power_of_two, 32));

  const at::ScalarType compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor y = x.to(compute).reshape({-1, block});
  int64_t inner = 1;
  for (auto order = orders.rbegin(); order != orders.rend(); ++order) {
    Tensor h = orthogonal_factor(*order, y.options());
    if (transpose) h = h.t();
    y = inner == 1 ? at::matmul(y.reshape({-1, *order}), h) : at::matmul(h.t(), y.reshape({-1, *order, inner}));
    inner *= *order;
  }
  return y.reshape(x.sizes()).to(x.scalar_type());
}

int64_t hadamard_block_size(int64_t n) {
  TORCH_CHECK(n >= 1, "hadamard_block_size: n is ", n, " but a size is at least 1");
  static std::mutex mutex;
  static std::map<int64_t, int64_t> sizes;
  const std::lock_guard lock(mutex);
  int64_t& size = sizes[n];
  for (int64_t blocks = 1; size == 0; ++blocks) {
    if (n % blocks == 0 && !hadamard_factors(n / blocks).empty()) size = n / blocks;
  }
  return size;
}

Tensor hadamard_matrix(int64_t n) {
  const int64_t block = hadamard_block_size(n);
  TORCH_CHECK(block == n, "hadamard_matrix: no construction of order ", n,
              " is known; the largest divisor with one is ", block);
  Tensor result = at::ones({1, 1}, at::kDouble);
  for (const int64_t order : hadamard_factors(n)) result = at::kron(result, as_tensor(hadamard_signs(order)));
  return result / std::sqrt(static_cast<double>(n));
}

Tensor hadamard_transform(const Tensor& x, bool transpose) {
  TORCH_CHECK(x.dim() >= 1 && at::isFloatingType(x.scalar_type()), "hadamard_transform: x is ", x.scalar_type(), " ",
              x.sizes(), " but a floating-point tensor of at least one dimension is needed");
  if (x.size(-1) == 0) return x.clone();
  const int64_t block = hadamard_block_size(x.size(-1));
  // Without gradients the bookkeeping would cost more than a row.
  const bool learned = c10::GradMode::is_enabled() && x.requires_grad();
  if (!learned && x.device().is_cpu()) return transform_on_cpu(x, block, transpose);
  return HadamardFunction::apply(x, block, transpose);
}

}  // namespace baseq
