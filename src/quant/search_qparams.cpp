#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <limits>
#include <vector>

#include "baseq/quant/quantize.h"
#include "fused.h"
#include "grid.h"

namespace baseq {
namespace {

double ratio_of(const MseSearch& search, int64_t step) {
  return 1 - search.max_shrink * static_cast<double>(step) / static_cast<double>(search.num_steps);
}

/// The best ratio of each row.
/// @param rows [rows, n] float32; importance [groups, n], row i taking row i mod groups, or undefined
Tensor best_ratios(const Tensor& rows, const QuantSpec& spec, const MseSearch& search, const Tensor& importance) {
  const int64_t count = rows.size(0), n = rows.size(1);
  const float* x = rows.const_data_ptr<float>();
  const auto norm = static_cast<float>(search.norm);
  const auto loss_at = [&](int64_t row, const Extremes& range, int64_t step) {
    const auto ratio = static_cast<float>(ratio_of(search, step));
    const float* weighting =
        importance.defined() ? importance.const_data_ptr<float>() + row % importance.size(0) * n : nullptr;
    return distortion(x + row * n, weighting, n, grid_over(range, ratio, spec).grid, norm);
  };
  const Tensor best = at::ones({count});
  float* out = best.mutable_data_ptr<float>();
  const auto choose = [&](int64_t row, const auto& loss_of_step) {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t step = 0; step < search.num_steps; ++step) {
      const double loss = loss_of_step(step);
      if (loss < least) {
        least = loss;
        out[row] = static_cast<float>(ratio_of(search, step));
      }
    }
  };
  // Few long rows are shared out by steps instead.
  if (constexpr int64_t kFewRows = 64; count < kFewRows) {
    std::vector<double> losses(count * search.num_steps);
    std::vector<Extremes> ranges;
    for (int64_t row = 0; row < count; ++row) ranges.push_back(find_range(x + row * n, n));
    at::parallel_for(0, count * search.num_steps, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / search.num_steps;
        losses[i] = loss_at(row, ranges[row], i % search.num_steps);
      }
    });
    for (int64_t row = 0; row < count; ++row) {
      choose(row, [&](int64_t step) { return losses[row * search.num_steps + step]; });
    }
    return best;
  }
  at::parallel_for(0, count, 1 + 16384 / (n * search.num_steps), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Extremes range = find_range(x + row * n, n);
      choose(row, [&](int64_t step) { return loss_at(row, range, step); });
    }
  });
  return best;
}

/// The same of any device and type by tensor operations.
Tensor composite_best_ratios(const Tensor& rows, const QuantSpec& spec, const MseSearch& search,
                             const Tensor& importance) {
  Tensor least, best = at::ones({rows.size(0), 1}, rows.options());
  const Tensor weighting = importance.defined()
                               ? importance.to(rows.scalar_type()).repeat({rows.size(0) / importance.size(0), 1})
                               : Tensor();
  for (int64_t step = 0; step < search.num_steps; ++step) {
    const double ratio = ratio_of(search, step);
    const QParams qparams = compute_qparams(rows, spec, at::full({1}, ratio, rows.options()));
    Tensor loss = (rows - fake_quantize(rows, qparams, spec)).abs_().pow_(search.norm);
    if (weighting.defined()) loss *= weighting;
    loss = loss.sum(-1, /*keepdim=*/true);
    if (!least.defined()) least = at::full_like(loss, std::numeric_limits<double>::infinity());
    const Tensor better = loss < least;
    best = at::where(better, at::full_like(best, ratio), best);
    least = at::where(better, loss, least);
  }
  return best;
}

}  // namespace

QParams search_qparams(const Tensor& x, const QuantSpec& spec, const MseSearch& search, const Tensor& importance) {
  check_spec("search_qparams", spec);
  TORCH_CHECK(search.num_steps >= 1 && search.norm > 0 && search.max_shrink >= 0 && search.max_shrink <= 1,
              "search_qparams: num_steps is ", search.num_steps, ", norm ", search.norm, " and max_shrink ",
              search.max_shrink, ", expected at least 1, above 0 and 0 to 1");
  TORCH_CHECK(!importance.defined() || (importance.dim() == 1 && importance.size(0) == x.size(-1)),
              "search_qparams: importance is ", importance.sizes(), ", expected [", x.size(-1), "]");
  const at::NoGradGuard no_grad;
  const Tensor grouped = group_view(x, spec);
  TORCH_CHECK(grouped.numel() > 0, "search_qparams: tensor of size ", x.sizes(), " has no elements");
  const int64_t n = grouped.size(2), count = grouped.size(0) * grouped.size(1);
  Tensor weighting;
  if (importance.defined()) {
    const bool one_row = spec.strategy == Strategy::kTensor;
    weighting = (one_row ? importance.expand_as(x) : importance).reshape({-1, n}).to(at::kFloat).contiguous();
  }
  QuantSpec per_row = spec;
  per_row.strategy = Strategy::kChannel;
  Tensor ratios;
  if (is_fusable(grouped) && is_fusable(weighting)) {
    ratios = best_ratios(grouped.contiguous().view({count, n}), per_row, search, weighting);
  } else {
    // A few temporaries of the size of a chunk live at a time. Chunks begin at the first group of a row.
    const Tensor rows = grouped.reshape({count, n}).to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 24) / (n * grouped.size(1))) * grouped.size(1);
    std::vector<Tensor> parts;
    for (int64_t begin = 0; begin < count; begin += chunk) {
      parts.push_back(
          composite_best_ratios(rows.slice(0, begin, std::min(begin + chunk, count)), per_row, search, weighting));
    }
    ratios = at::cat(parts);
  }
  return compute_qparams(x, spec, ratios.view({grouped.size(0), grouped.size(1), 1}));
}

}  // namespace baseq
