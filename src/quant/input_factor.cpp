#include "input_factor.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>

#include "finite.h"
#include "product.h"

namespace baseq {
namespace {

/// Up to this many columns the factor takes no time worth saving in float64.
constexpr int64_t kExactColumns = 512;
/// Columns of a diagonal block of the float32 factor.
constexpr int64_t kFactorBlock = 512;
/// The least share of a diagonal value that a pivot of the float32 factor may be: its rounding errors, some 1e-7 of the
/// diagonal value, have to stay small beside it.
constexpr double kLeastFloatPivot = 1e-4;

/// Rows and columns of a float64 matrix in another order and type.
template <class Out>
Tensor reordered(const Tensor& matrix, const Tensor& order, at::ScalarType dtype) {
  if (!matrix.is_cpu()) return matrix.index_select(0, order).index_select(1, order).to(dtype);
  const int64_t n = matrix.size(0);
  const Tensor result = at::empty({n, n}, dtype);
  const auto* from = matrix.const_data_ptr<double>();
  const auto* at = order.const_data_ptr<int64_t>();
  Out* to = result.mutable_data_ptr<Out>();
  at::parallel_for(0, n, 1 + 32768 / n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double* row = from + at[i] * n;
      for (int64_t j = 0; j < n; ++j) to[i * n + j] = static_cast<Out>(row[at[j]]);
    }
  });
  return result;
}

/// Blocks from the last columns to the first. Their diagonal blocks are factored in float64, the products in between
/// are float32. Sets `pivots` and `feedback`; false when a pivot is too small for that.
bool factor_in_float32(InputFactor& factor, const Tensor& diagonal) {
  const int64_t n = diagonal.size(0);
  const Tensor g = reordered<float>(factor.moments, factor.order, at::kFloat);  // becomes R^T, row by row
  g.diagonal().copy_(diagonal);
  const Tensor pivots = at::empty_like(diagonal);
  Conditions conditions;
  for (int64_t end = n, begin = 0; end > 0; end = begin) {
    begin = std::max<int64_t>(0, end - kFactorBlock);
    const Tensor rows = g.slice(0, begin, end);
    if (end < n) {
      const Tensor later = g.slice(0, end).slice(1, 0, end).contiguous();
      rows.slice(1, 0, end).sub_(matrix_product(later.slice(1, begin).t().contiguous(), later));
    }
    const Tensor square = rows.slice(1, begin, end);
    const auto [upper, usable] = upper_factor(square.to(at::kDouble));
    if (!conditions.add(usable)) return false;
    const Tensor found = upper.diagonal().square();
    pivots.slice(0, begin, end).copy_(found);
    if (!conditions.add(found.ge(diagonal.slice(0, begin, end) * kLeastFloatPivot).all())) return false;
    square.copy_(upper.t());
    if (begin == 0) break;
    const Tensor inverse =
        at::linalg_solve_triangular(upper, at::eye(end - begin, upper.options()), /*upper=*/true).to(at::kFloat);
    const Tensor earlier = rows.slice(1, 0, begin);
    earlier.copy_(matrix_product(inverse, earlier.contiguous()));
  }
  conditions.add(has_usable_pivots(pivots, diagonal));
  if (!conditions.all_hold()) return false;
  factor.feedback = g.div_(pivots.sqrt().to(at::kFloat).unsqueeze(1));
  factor.pivots = pivots.to(at::kFloat);
  return true;
}

/// The same in float64 by LAPACK, which wants rows and columns in reverse: with A = L L^T there, H = R R^T here.
bool factor_in_float64(InputFactor& factor, const Tensor& diagonal) {
  const int64_t n = diagonal.size(0);
  const Tensor matrix = reordered<double>(factor.moments, factor.order.flip(0), at::kDouble);
  matrix.diagonal().copy_(diagonal.flip(0));
  Tensor lower = matrix.t();  // column-major, as LAPACK works
  Tensor info = at::empty({}, matrix.options().dtype(at::kInt));
  at::linalg_cholesky_ex_out(lower, info, lower);
  const Tensor root = lower.diagonal().flip(0);
  // What is not finite in a row makes the row's diagonal so.
  Conditions conditions;
  conditions.add(info.eq(0).logical_and(root.isfinite().all()));
  conditions.add(has_usable_pivots(root.square(), diagonal));
  if (!conditions.all_hold()) return false;
  factor.feedback = at::empty({n, n}, matrix.options().dtype(at::kFloat));
  constexpr int64_t kRows = 512;  // no second matrix in float64
  for (int64_t begin = 0; begin < n; begin += kRows) {
    const int64_t rows = std::min(kRows, n - begin);
    const Tensor part = matrix.narrow(0, n - begin - rows, rows).flip({0, 1});
    factor.feedback.narrow(0, begin, rows).copy_(part.div_(root.narrow(0, begin, rows).unsqueeze(1)));
  }
  factor.pivots = root.square().to(at::kFloat);
  return true;
}

/// P = strength * triu(D U^T, 1) U in GPTAQ's notation with U^T U the inverse of the Hessian, so that W (I + P) is what
/// to round.
///
/// The readers of a layer want W x_fp, so the best unrounded weights for the inputs x are W (I + E[(x_fp - x)^T x]
/// H^-1). GPTAQ keeps the part by which each column is made up for by later columns. All corrections are linear in the
/// weights they multiply, and ResComp multiplies the original ones: then the sum over columns is one product, and
/// rounding the result with plain GPTQ is the same as correcting inside the column loop.
Tensor correction_for(const InputFactor& factor, const Tensor& cross, double strength) {
  Tensor upper = factor.feedback.tril(-1).to(at::kDouble);
  upper.diagonal().fill_(1);
  upper = upper.mul_(factor.pivots.to(at::kDouble).sqrt().unsqueeze(1)).t();
  const Tensor ordered = reordered<double>(cross, factor.order, at::kDouble);
  const Tensor later =
      at::linalg_solve_triangular(upper.t(), ordered, /*upper=*/false, /*left=*/false).triu_(1);  // triu(D U^T, 1)
  return at::linalg_solve_triangular(upper, later, /*upper=*/true, /*left=*/false).mul_(strength).to(at::kFloat);
}

}  // namespace

Tensor damp(InputFactor& factor, const Tensor& diagonal, const GptqOptions& options) {
  // Inputs that are always zero constrain nothing and say nothing of the others: they do not count in the mean, and
  // with it on their diagonal they are rounded on their own.
  const Tensor live = diagonal.masked_select(diagonal != 0);
  const Tensor mean = live.numel() > 0 ? live.mean() : at::ones({}, diagonal.options());
  factor.order = options.activation_order ? at::argsort(diagonal, /*stable=*/true, /*dim=*/0, /*descending=*/true)
                                          : at::arange(diagonal.size(0), diagonal.options().dtype(at::kLong));
  const Tensor ordered = diagonal.index_select(0, factor.order);
  const Tensor added = at::where(ordered == 0, mean, at::zeros_like(ordered)) + mean * factor.damping;
  factor.added = added.to(at::kFloat);
  return ordered + added;
}

UpperFactor upper_factor(const Tensor& matrix) {
  const auto [lower, info] = at::linalg_cholesky_ex(matrix.flip({0, 1}));
  return {lower.flip({0, 1}), info.eq(0).logical_and(lower.diagonal().isfinite().all())};
}

bool Conditions::add(const Tensor& condition) {
  all_ = all_.defined() ? all_.logical_and(condition) : condition;
  return !condition.is_cpu() || condition.item<bool>();
}

bool Conditions::all_hold() const { return !all_.defined() || all_.item<bool>(); }

Tensor has_usable_pivots(const Tensor& pivots, const Tensor& diagonal) {
  constexpr double kNothing = 1e-18;
  constexpr double kSafety = 100;  // errors of the matrix itself grow on their way to the last pivots
  const double rounding = kSafety * static_cast<double>(diagonal.size(0)) * std::numeric_limits<double>::epsilon();
  const Tensor least = at::maximum(diagonal * rounding, diagonal.max() * kNothing);
  return pivots.ge(least).all();
}

InputFactor factor_moments(const Tensor& moments, const GptqOptions& options, const Tensor& cross) {
  const at::NoGradGuard no_grad;
  InputFactor factor;
  const Tensor h = moments.to(at::kDouble).contiguous();
  if (!all_finite(h)) return factor;
  factor.moments = h;
  const Tensor diagonal = h.diagonal().contiguous();
  if ((diagonal < 0).any().item<bool>()) return factor;
  for (factor.damping = options.damping;; factor.damping = std::min(1.0, std::max(10 * factor.damping, 1e-4))) {
    const Tensor damped = damp(factor, diagonal, options);
    if (h.size(0) > kExactColumns && factor_in_float32(factor, damped)) break;
    if (factor_in_float64(factor, damped)) break;
    if (factor.damping >= 1) return factor;
  }
  if (cross.defined()) {
    const Tensor d = cross.to(at::kDouble).contiguous();
    TORCH_CHECK(all_finite(d), "gptq: cross has a value that is not finite");
    factor.correction = correction_for(factor, d, options.cross_strength);
  }
  return factor;
}

}  // namespace baseq
