#include "cayley_sgd.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace baseq {

void cayley_step(Tensor matrix, const Tensor& gradient, double rate) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(matrix.dim() >= 2 && matrix.size(-1) == matrix.size(-2) && gradient.sizes() == matrix.sizes(),
              "cayley_step: matrices are ", matrix.sizes(), " and gradients ", gradient.sizes(),
              ", expected both [..., n, n]");
  constexpr int kIterations = 5;
  const Tensor start = matrix.mT().contiguous(), direction = -gradient.mT();
  const Tensor product = at::matmul(direction, matrix);
  const Tensor half = product - at::matmul(start, at::matmul(matrix, product)) / 2;
  const Tensor skew = half - half.mT();
  // The largest sum of magnitudes of a column.
  const Tensor norm = skew.abs().sum(-2).amax(-1).unsqueeze(-1).unsqueeze(-1);
  const Tensor step = (norm + 1e-8).reciprocal().clamp_max(rate);
  Tensor moved = start + step * at::matmul(skew, start);
  for (int i = 0; i < kIterations; ++i) moved = start + step / 2 * at::matmul(skew, start + moved);
  matrix.copy_(moved.mT());
}

Tensor nearest_orthogonal(const Tensor& matrix) {
  const auto [u, s, v] = at::linalg_svd(matrix.to(at::kDouble), /*full_matrices=*/false);
  return at::matmul(u, v);
}

}  // namespace baseq
