#include "product.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>

#include <optional>
#include <string_view>

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

/// Rows or columns one behind the other: for other strides oneDNN has a loop a thousand times slower.
Tensor dense(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 2 && t.t().is_contiguous()) ? t : t.contiguous();
}

}  // namespace

Tensor linear_product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const bool onednn = suits(x) && suits(weight) && suits(bias) && x.numel() > 0 && weight.numel() > 0 &&
                      at::globalContext().userEnabledMkldnn() && onednn_linear();
  if (!onednn) return at::linear(x, weight, bias);
  const std::optional<Tensor> offset = bias.defined() ? std::make_optional(bias) : std::nullopt;
  return onednn_linear()->call(dense(x), dense(weight), offset, "none", c10::List<std::optional<at::Scalar>>(), "");
}

Tensor matrix_product(const Tensor& a, const Tensor& b) { return linear_product(a, b.t()); }

}  // namespace baseq
