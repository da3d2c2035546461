#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "baseq/quant/quantize.h"
#include "grid.h"

namespace baseq {

QParams search_qparams(const Tensor& x, const QuantSpec& spec, const MseSearch& search, const Tensor& importance) {
  check_spec("search_qparams", spec);
  TORCH_CHECK(search.num_steps >= 1 && search.norm > 0 && search.max_shrink >= 0 && search.max_shrink <= 1,
              "search_qparams: num_steps is ", search.num_steps, ", norm ", search.norm, " and max_shrink ",
              search.max_shrink, ", expected at least 1, above 0 and 0 to 1");
  TORCH_CHECK(!importance.defined() || importance.numel() == x.size(-1), "search_qparams: importance is ",
              importance.sizes(), ", expected [", x.size(-1), "]");
  const at::NoGradGuard no_grad;
  const Tensor weighting = importance.defined() ? group_view(importance.expand_as(x), spec) : Tensor();
  Tensor best_loss, best_ratio;
  for (int64_t step = 0; step < search.num_steps; ++step) {
    const double ratio = 1 - search.max_shrink * static_cast<double>(step) / static_cast<double>(search.num_steps);
    const QParams qparams = compute_qparams(x, spec, at::full({1}, ratio, x.options().dtype(at::kFloat)));
    Tensor loss = (group_view(x, spec) - group_view(fake_quantize(x, qparams, spec), spec)).abs().pow(search.norm);
    if (weighting.defined()) loss = loss * weighting;
    loss = loss.sum(-1);
    if (step == 0) {
      best_loss = loss;
      best_ratio = at::ones_like(loss);
    } else {
      const Tensor better = loss < best_loss;
      best_ratio = at::where(better, ratio, best_ratio);
      best_loss = at::where(better, loss, best_loss);
    }
  }
  return compute_qparams(x, spec, best_ratio.unsqueeze(-1));
}

}  // namespace baseq
