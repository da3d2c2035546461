#include "product.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "bfloat16_product.h"
#include "matmul_precision.h"

namespace baseq {
namespace {

using LinearPointwise = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                               c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

/// The operator behind torch.compile's linears; absent when LibTorch was built without oneDNN.
const std::optional<c10::TypedOperatorHandle<LinearPointwise>>& onednn_linear() {
  static const auto op = [] {
    const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return handle ? std::make_optional(handle->typed<LinearPointwise>()) : std::nullopt;
  }();
  return op;
}

bool suits(const Tensor& t) {
  return !t.defined() ||
         (t.device().is_cpu() && t.scalar_type() == at::kFloat && !(c10::GradMode::is_enabled() && t.requires_grad()));
}

bool suit(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return suits(x) && suits(weight) && suits(bias) && x.numel() > 0 && weight.numel() > 0;
}

/// Rows or columns one behind the other: for other strides oneDNN has a loop a thousand times slower.
Tensor dense(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 2 && t.t().is_contiguous()) ? t : t.contiguous();
}

}  // namespace

bool rounds_factors(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return factor_dtype(MatmulPrecisionScope::current(), x.device()) == at::kBFloat16 && suit(x, weight, bias);
}

Tensor rounded_linear_product(const Tensor& factor, at::IntArrayRef sizes, const Tensor& weight, const Tensor& bias) {
  Tensor y = bfloat16_product(factor, bfloat16_factor(weight));
  if (bias.defined()) y.add_(bias);
  std::vector<int64_t> result = sizes.vec();
  result.back() = weight.size(0);
  return y.view(result);
}

Tensor linear_product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (rounds_factors(x, weight, bias)) return rounded_linear_product(bfloat16_factor(x), x.sizes(), weight, bias);
  const bool onednn = suit(x, weight, bias) && at::globalContext().userEnabledMkldnn() && onednn_linear();
  if (!onednn) return at::linear(x, weight, bias);
  const std::optional<Tensor> offset = bias.defined() ? std::make_optional(bias) : std::nullopt;
  return onednn_linear()->call(dense(x), dense(weight), offset, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor matrix_product(const Tensor& a, const Tensor& b) { return linear_product(a, b.t()); }

Tensor symmetric_product(const Tensor& a, const Tensor& b) {
  const int64_t n = b.size(1), width = std::max<int64_t>(512, n / 8);
  if (n <= width) return matrix_product(a.t(), b);
  const Tensor result = at::empty({n, n}, b.options());
  for (int64_t begin = 0; begin < n; begin += width) {
    const int64_t end = std::min(begin + width, n);
    const Tensor part = matrix_product(a.slice(1, begin, end).contiguous().t(), b.slice(1, begin).contiguous());
    result.slice(0, begin, end).slice(1, begin).copy_(part);
    result.slice(0, end).slice(1, begin, end).copy_(part.slice(1, end - begin).t());
  }
  return result;
}

Tensor moment_product(const Tensor& x, const Tensor& weights) {
  if (!rounds_factors(x, x)) return symmetric_product(weights.defined() ? x * weights : x, x);
  // Both factors are rounded alike, so that no eigenvalue becomes negative where a few tokens are all that is large.
  return bfloat16_square(bfloat16_factor((weights.defined() ? x * weights.sqrt() : x).t()));
}

}  // namespace baseq
