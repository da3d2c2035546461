#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "finite.h"
#include "input_factor.h"

namespace baseq {

bool few_tokens(int64_t num_tokens, int64_t columns, const GptqOptions& options) {
  return options.damping > 0 && 4 * num_tokens <= columns;
}

/// The Schur complements that define R are R_ij R_jj = x_i^T M_j x_j for i < j, x_j a column of x, with
/// M_j = (I + sum over k > j of x_k x_k^T / A_k)^-1 of size [num_tokens, num_tokens]. From the last columns to the
/// first, a block J of columns at a time: with M of all columns behind it, X_J^T M X_J + A_J = R_J R_J^T, the columns
/// of V_J = M X_J R_J^-T are M_j x_j / R_jj, and V_J V_J^T is what M loses to the block. All in float64, which costs no
/// more than 4 num_tokens^2 operations a column.
InputFactor factor_tokens(const Tensor& x, const GptqOptions& options) {
  constexpr int64_t kColumns = 256;
  TORCH_INTERNAL_ASSERT(options.damping > 0, "factor_tokens: the damping must be positive");
  const at::NoGradGuard no_grad;
  InputFactor factor;
  if (!all_finite(x)) return factor;
  const int64_t num_tokens = x.size(0), n = x.size(1);
  factor.damping = options.damping;
  const Tensor diagonal = damp(factor, x.to(at::kDouble).square_().sum(0), options);
  factor.tokens = x.index_select(1, factor.order);
  factor.responses = at::empty({n, num_tokens}, x.options());
  const Tensor rest = at::eye(num_tokens, diagonal.options()), pivots = at::empty_like(diagonal);
  const Tensor added = factor.added.to(at::kDouble);
  Conditions conditions;
  for (int64_t end = n, begin = 0; end > 0; end = begin) {
    begin = std::max<int64_t>(0, end - kColumns);
    const Tensor block = factor.tokens.slice(1, begin, end).to(at::kDouble).contiguous();
    const Tensor image = at::mm(rest, block);
    Tensor square = at::mm(block.t(), image);
    square.diagonal().add_(added.slice(0, begin, end));
    const auto [upper, usable] = upper_factor(square);
    if (!conditions.add(usable)) return {};
    const Tensor root = upper.diagonal();
    const Tensor images = at::linalg_solve_triangular(upper.t(), image, /*upper=*/false, /*left=*/false);  // V_J
    pivots.slice(0, begin, end).copy_(root.square());
    factor.responses.slice(0, begin, end).copy_((images / root).t());
    if (begin > 0) rest.addmm_(images, images.t(), /*beta=*/1, /*alpha=*/-1);
  }
  conditions.add(has_usable_pivots(pivots, diagonal));
  if (!conditions.all_hold()) return {};
  factor.pivots = pivots.to(at::kFloat);
  return factor;
}

}  // namespace baseq
