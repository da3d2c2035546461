#include "baseq/quant/gptq.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <limits>

#include "finite.h"
#include "gptq_block.h"
#include "grid.h"
#include "product.h"

namespace baseq {
namespace {

/// Calibration tokens are folded into the Hessian this many at a time: their products are float32, and long float32
/// sums would lose the small eigenvalues.
constexpr int64_t kHessianChunk = 2048;

/// Whether every pivot of a Cholesky factor says something: a pivot is what is left of a diagonal value when the
/// columns before it are known. One that is less than the rounding errors of its own diagonal value comes from them
/// alone, and one that is nothing beside the largest value makes a feedback without bound. Any damping worth the name
/// keeps both away.
/// @param diagonal of the matrix
bool has_usable_pivots(const Tensor& lower, const Tensor& diagonal) {
  constexpr double kNothing = 1e-18;
  constexpr double kSafety = 100;  // errors of the matrix itself grow on their way to the last pivots
  const double rounding = kSafety * static_cast<double>(diagonal.size(0)) * std::numeric_limits<double>::epsilon();
  const Tensor least = at::maximum(diagonal * rounding, diagonal.max() * kNothing);
  return lower.diagonal().square().ge(least).all().item<bool>();
}

/// Lower triangular L with A = L L^T; undefined when A has none, or none that is more than rounding errors.
///
/// With rows and columns of A = L L^T and of L in reverse, A becomes H = R R^T with an upper triangular R. GPTQ's
/// feedback needs no more than this. With the inverse of the Hessian factored as U^T U, U = R^-1, GPTQ subtracts
/// (w_i - q_i) U_ij / U_ii from column j, where w_i carries all earlier corrections. In terms of the *original* weights
/// w^0 that is w_j = w^0_j + sum over i < j of (w^0_i - q_i) R_ij / R_jj (the equivalence of LDLQ with GPTQ, arXiv
/// 2307.13304, Theorem 6): the Hessian is factored once and never inverted.
/// Overwrites `matrix`, symmetric and contiguous, with the factor.
Tensor factor_in_place(const Tensor& matrix) {
  const Tensor diagonal = matrix.diagonal().clone();
  Tensor lower = matrix.t();  // column-major, as LAPACK works
  Tensor info = at::empty({}, at::kInt);
  at::linalg_cholesky_ex_out(lower, info, lower);
  // What is not finite in a row makes the row's diagonal so.
  if (info.item<int64_t>() != 0 || !all_finite(lower.diagonal()) || !has_usable_pivots(lower, diagonal)) return {};
  return lower;
}

/// W (I + P), P = strength * triu(D U^T, 1) U in GPTAQ's notation with U^T U the inverse of the Hessian.
///
/// The readers of a layer want W x_fp, so the best unrounded weights for the inputs x are W (I + E[(x_fp - x)^T x]
/// H^-1). GPTAQ keeps the part by which each column is made up for by later columns. All corrections are linear in the
/// weights they multiply, and ResComp multiplies the original ones: then the sum over columns is one product, and
/// rounding the result with plain GPTQ is the same as correcting inside the column loop.
Tensor add_cross_term(const Tensor& weight, const Tensor& factor, const Tensor& cross, double strength) {
  const Tensor later =
      at::linalg_solve_triangular(factor.t(), cross, /*upper=*/false, /*left=*/false).triu_(1);  // triu(D U^T, 1)
  const Tensor correction = at::linalg_solve_triangular(factor, later, /*upper=*/true, /*left=*/false);
  return at::addmm(weight, weight, correction.to(at::kFloat), /*beta=*/1, /*alpha=*/strength);
}

/// R_ij / R_jj with R, `lower` with rows and columns in reverse, float32: what an error does to the later columns.
/// Overwrites `lower`.
Tensor feedback_of(const Tensor& lower) {
  lower.div_(lower.diagonal().clone());
  const Tensor feedback = at::empty(lower.sizes(), at::kFloat);
  constexpr int64_t kRows = 512;  // no second matrix in float64
  for (int64_t begin = 0; begin < lower.size(0); begin += kRows) {
    const int64_t rows = std::min(kRows, lower.size(0) - begin);
    feedback.narrow(0, begin, rows).copy_(lower.narrow(0, lower.size(0) - begin - rows, rows).flip({0, 1}));
  }
  return feedback;
}

/// Scale and zero point of every row in columns [rows, groups]; a tensor-wide grid is repeated over the rows.
QParams by_row(const QParams& qparams, int64_t rows) {
  const auto expand = [&](const Tensor& t) {
    return t.defined() ? t.expand({rows, t.size(1)}).contiguous() : Tensor();
  };
  return {expand(qparams.scale), expand(qparams.zero_point)};
}

int64_t block_size_for(const GptqOptions& options, const QuantSpec& spec, int64_t columns, bool params_on_the_way) {
  if (!params_on_the_way) return std::min(options.block_size, columns);
  // A group has to begin where all earlier columns have been made up for, that is with a block.
  int64_t size = std::min(options.block_size, spec.group_size);
  while (spec.group_size % size != 0) --size;
  return size;
}

}  // namespace

Hessian::Hessian(int64_t features) : sum_(at::zeros({features, features}, at::kDouble)) {
  TORCH_CHECK(features > 0, "Hessian: features is ", features, ", expected a positive number");
}

void Hessian::add(const Tensor& x) {
  const int64_t features = sum_.size(0);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == features, "Hessian: x is ", x.sizes(), ", expected [..., ", features, "]");
  const at::NoGradGuard no_grad;
  const Tensor rows = x.reshape({-1, features});
  if (sum_.device() != x.device()) sum_ = sum_.to(x.device());
  for (int64_t begin = 0; begin < rows.size(0); begin += kHessianChunk) {
    const Tensor chunk = rows.slice(0, begin, std::min(begin + kHessianChunk, rows.size(0))).to(at::kFloat);
    sum_.add_(matrix_product(chunk.t(), chunk));
  }
  num_tokens_ += rows.size(0);
}

Tensor Hessian::mean() const {
  TORCH_CHECK(num_tokens_ > 0, "Hessian: no tokens were added before mean()");
  return sum_ / static_cast<double>(num_tokens_);
}

Tensor second_moments(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, "second_moments: x is a scalar, expected inputs [..., features]");
  Hessian hessian(x.size(-1));
  hessian.add(x);
  return hessian.mean();
}

double quadratic_form(const Tensor& matrix, const Tensor& hessian) {
  constexpr int64_t kColumns = 512;
  double total = 0;
  for (int64_t begin = 0; begin < hessian.size(0); begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, hessian.size(0));
    Tensor block = hessian.slice(0, 0, end).slice(1, begin, end).to(at::kFloat, false, /*copy=*/true);
    block.slice(0, 0, begin).mul_(2);
    const Tensor product = matrix_product(matrix.slice(1, 0, end), block);
    total += product.mul_(matrix.slice(1, begin, end)).sum(at::kDouble).item<double>();
  }
  return total;
}

QuantizedWeight round_to_nearest(const Tensor& weight, const QuantSpec& spec, bool mse_clip, const MseSearch& search) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "round_to_nearest: weight is ", weight.scalar_type(),
              " of size ", weight.sizes(), ", expected a floating type and [out_features, in_features]");
  check_weight_spec("round_to_nearest", spec);
  const at::NoGradGuard no_grad;
  const Tensor source = weight.to(at::kFloat);
  TORCH_CHECK(all_finite(source), "round_to_nearest: weight has a value that is not finite");
  const QParams qparams = mse_clip ? search_qparams(source, spec, search) : compute_qparams(source, spec);
  return {spec, quantize(source, qparams, spec), qparams};
}

GptqResult gptq(const Tensor& weight, const Tensor& hessian, const QuantSpec& spec, const GptqOptions& options,
                const Tensor& cross) {
  check_weight_spec("gptq", spec);
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "gptq: weight is ", weight.scalar_type(), " of size ",
              weight.sizes(), ", expected a floating type and [out_features, in_features]");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  TORCH_CHECK(hessian.sizes() == at::IntArrayRef({columns, columns}), "gptq: hessian is ", hessian.sizes(),
              " but weight is ", weight.sizes());
  TORCH_CHECK(!cross.defined() || cross.sizes() == hessian.sizes(), "gptq: cross is ", cross.sizes(),
              " but hessian is ", hessian.sizes());
  TORCH_CHECK(options.block_size > 0 && options.damping >= 0, "gptq: block_size is ", options.block_size,
              " and damping ", options.damping, ", expected a positive and a non-negative number");
  const bool params_on_the_way = spec.strategy == Strategy::kGroup && !options.static_groups;
  TORCH_CHECK(!(params_on_the_way && options.activation_order),
              "gptq: activation_order without static_groups scatters the groups over the columns, which this format "
              "cannot store; expected static_groups = true");
  const at::NoGradGuard no_grad;
  const Tensor source = weight.to(at::kCPU, at::kFloat).contiguous();
  TORCH_CHECK(all_finite(source), "gptq: weight has a value that is not finite");
  const Tensor h = hessian.to(at::kCPU, at::kDouble).contiguous();

  const auto qparams_of = [&](const Tensor& w, const QuantSpec& grid) {
    return options.mse_clip ? search_qparams(w, grid, options.search) : compute_qparams(w, grid);
  };
  GptqResult result{.weight = {spec, {}, {}}};
  const bool known = all_finite(h);
  const auto energy_of = [&](const Tensor& w) {
    return known ? quadratic_form(w, h) : w.square().sum(at::kDouble).item<double>();
  };
  const auto finish = [&] {
    const Tensor error = result.weight.dequantized().sub_(source);
    const double energy = energy_of(source);
    result.relative_error = energy == 0 ? 0 : energy_of(error) / energy;
    return result;
  };
  const auto fall_back = [&] {
    result.weight = round_to_nearest(source, spec, options.mse_clip, options.search);
    result.fell_back_to_rtn = true;
    return finish();
  };
  const Tensor diagonal = h.diagonal();
  if (!known || (diagonal < 0).any().item<bool>()) return fall_back();

  // Inputs that are always zero constrain nothing and say nothing of the others: they do not count in the mean, and
  // with it on their diagonal they are rounded on their own.
  const Tensor live = diagonal.masked_select(diagonal != 0);
  const double mean_diagonal = live.numel() > 0 ? live.mean().item<double>() : 1.0;
  const Tensor filled = at::where(diagonal == 0, mean_diagonal, diagonal);
  const Tensor order = options.activation_order ? at::argsort(diagonal, /*stable=*/true, /*dim=*/0, /*descending=*/true)
                                                : at::arange(columns);
  Tensor target = options.activation_order ? source.index_select(1, order) : source;
  Tensor lower;  // beside h the only float64 matrix of this size, unless there is a cross term
  {
    const Tensor reverse = order.flip(0);
    for (result.damping = options.damping;; result.damping = std::min(1.0, std::max(10 * result.damping, 1e-4))) {
      Tensor damped = h.index({reverse.unsqueeze(1), reverse});  // a copy
      damped.diagonal().copy_(filled.index_select(0, reverse) + result.damping * mean_diagonal);
      lower = factor_in_place(damped);
      if (lower.defined()) break;
      if (result.damping >= 1) return fall_back();
    }
  }

  if (cross.defined()) {
    Tensor d = cross.to(at::kCPU, at::kDouble);
    TORCH_CHECK(all_finite(d), "gptq: cross has a value that is not finite");
    if (options.activation_order) d = d.index({order.unsqueeze(1), order});
    target = add_cross_term(target, lower.flip({0, 1}), d, options.cross_strength);
  }

  const int64_t group_size = spec.strategy == Strategy::kGroup ? spec.group_size : columns;
  QParams qparams;
  if (!params_on_the_way) {
    result.weight.qparams = qparams_of(source, spec);
    qparams = by_row(result.weight.qparams, rows);
  } else {
    (void)group_view(source, spec);  // throws when group_size does not divide the columns
    const Tensor empty = at::empty({rows, columns / group_size});
    qparams = {empty, spec.symmetric ? Tensor() : at::empty_like(empty)};
  }

  const Tensor feedback = feedback_of(lower);
  lower = Tensor();
  const Tensor corrected = target.clone();
  const Tensor codes = at::empty({rows, columns}, at::kChar);
  const int64_t block_size = block_size_for(options, spec, columns, params_on_the_way);
  const Tensor errors = at::empty({rows, block_size});
  for (int64_t begin = 0; begin < columns; begin += block_size) {
    const int64_t end = std::min(begin + block_size, columns);
    if (params_on_the_way && begin % group_size == 0) {
      QuantSpec one_group = spec;
      one_group.strategy = Strategy::kChannel;
      const QParams found = qparams_of(corrected.slice(1, begin, begin + group_size).contiguous(), one_group);
      qparams.scale.select(1, begin / group_size).copy_(found.scale.squeeze(1));
      if (!spec.symmetric) qparams.zero_point.select(1, begin / group_size).copy_(found.zero_point.squeeze(1));
    }
    const Tensor block_errors = errors.slice(1, 0, end - begin);
    round_block({.target = target,
                 .corrected = corrected,
                 .feedback = feedback,
                 .qparams = qparams,
                 .spec = spec,
                 .column_order = order,
                 .group_size = group_size,
                 .begin = begin,
                 .end = end},
                codes, block_errors);
    if (end < columns) {
      corrected.slice(1, end).addmm_(block_errors, feedback.slice(0, begin, end).slice(1, end));
    }
  }
  if (params_on_the_way) result.weight.qparams = qparams;
  result.weight.codes = options.activation_order ? codes.index_select(1, at::argsort(order)) : codes;
  return finish();
}

}  // namespace baseq
