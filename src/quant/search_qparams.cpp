#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <span>
#include <vector>

#include "baseq/quant/quantize.h"
#include "distortion_kernel.h"
#include "fused.h"
#include "grid.h"
#include "half_quadratic.h"

namespace baseq {
namespace {

double ratio_of(const MseSearch& search, int64_t step) {
  return 1 - search.max_shrink * static_cast<double>(step) / static_cast<double>(search.num_steps);
}

/// Which ratios are tried. Of many, every kGridsAtOnce-th part first, and then all between the neighbours of the two
/// best of these: the loss of a small group is not convex in the ratio, and one is not always enough.
struct Steps {
  std::vector<float> ratios;  ///< of all steps
  std::vector<int64_t> first;
  int64_t stride = 1;  ///< between the first ones

  explicit Steps(const MseSearch& search) {
    if (search.num_steps > 2 * kGridsAtOnce) stride = (search.num_steps + kGridsAtOnce - 1) / kGridsAtOnce;
    for (int64_t step = 0; step < search.num_steps; ++step) {
      ratios.push_back(static_cast<float>(ratio_of(search, step)));
      if (step % stride == 0) first.push_back(step);
    }
  }
};

/// The least of the losses that are told to it; of equal ones that of the largest ratio. NaN does not count.
struct Least {
  double loss = std::numeric_limits<double>::infinity();
  int64_t step = 0;

  void add(double other, int64_t at) {
    if (other < loss || (other == loss && at < step)) *this = {other, at};
  }
};

/// Values of a row whose losses are summed in one piece.
constexpr int64_t kPiece = 16384;

/// One row of `n` values and the losses of its grids.
struct SearchedRow {
  const float* x;
  const float* importance;  ///< null: all alike
  int64_t n;
  Extremes range;
  const QuantSpec& spec;
  const Steps& steps;
  float norm;

  /// Losses of up to kGridsAtOnce steps, up to a factor that they share.
  std::array<double, kGridsAtOnce> losses(std::span<const int64_t> tried) const {
    GridLanes lanes;
    std::array<float, kGridsAtOnce> scales;
    for (int64_t lane = 0; lane < kGridsAtOnce; ++lane) {
      const int64_t step = tried[std::min<size_t>(lane, tried.size() - 1)];
      const Grid grid = grid_over(range, steps.ratios[step], spec).grid;
      lanes.inverse[lane] = 1 / grid.scale;
      lanes.zero_point[lane] = grid.zero_point;
      lanes.base[lane] = grid.base;
      lanes.low = grid.low;
      lanes.high = grid.high;
      scales[lane] = grid.scale * unit();
    }
    std::array<double, kGridsAtOnce> sums{};
    if (n <= kPiece) {
      add_distortions(x, importance, n, lanes, norm, sums.data());
    } else {
      add_in_pieces(lanes, sums);
    }
    raise_to_power(scales.data(), norm);
    for (int64_t lane = 0; lane < kGridsAtOnce; ++lane) sums[lane] *= scales[lane];
    return sums;
  }

 private:
  /// Scales in units of about the range: their powers stay in the range of float32.
  float unit() const {
    const float largest = std::max(std::fabs(range.low), std::fabs(range.high));
    return largest > 0 ? 1 / largest : 1;
  }

  void add_in_pieces(const GridLanes& lanes, std::array<double, kGridsAtOnce>& sums) const {
    std::vector<std::array<double, kGridsAtOnce>> pieces((n + kPiece - 1) / kPiece);
    at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t start = piece * kPiece;
        add_distortions(x + start, importance == nullptr ? nullptr : importance + start, std::min(kPiece, n - start),
                        lanes, norm, pieces[piece].data());
      }
    });
    for (const auto& piece : pieces) {
      for (int64_t lane = 0; lane < kGridsAtOnce; ++lane) sums[lane] += piece[lane];
    }
  }
};

float best_ratio(const SearchedRow& row) {
  const Steps& steps = row.steps;
  Least best, second;
  const auto try_all = [&](const std::vector<int64_t>& tried, const auto& tell) {
    for (size_t begin = 0; begin < tried.size(); begin += kGridsAtOnce) {
      const std::span part = std::span(tried).subspan(begin, std::min<size_t>(kGridsAtOnce, tried.size() - begin));
      const auto losses = row.losses(part);
      for (size_t i = 0; i < part.size(); ++i) tell(losses[i], part[i]);
    }
  };
  try_all(steps.first, [&](double loss, int64_t step) {
    const Least before = best;
    best.add(loss, step);
    if (best.step != before.step) {
      second = before;
    } else if (step != best.step) {
      second.add(loss, step);
    }
  });
  std::vector<int64_t> near;
  near.reserve(4 * steps.stride);
  for (int64_t distance = 1; distance < steps.stride; ++distance) {
    for (const int64_t step :
         {best.step - distance, best.step + distance, second.step - distance, second.step + distance}) {
      if (step >= 0 && step < std::ssize(steps.ratios)) near.push_back(step);
    }
  }
  try_all(near, [&](double loss, int64_t step) { best.add(loss, step); });
  return steps.ratios[best.step];
}

/// The best ratio of each row.
/// @param rows [rows, n] float32; importance [groups, n], row i taking row i mod groups, or undefined
Tensor best_ratios(const Tensor& rows, const QuantSpec& spec, const MseSearch& search, const Tensor& importance) {
  const int64_t count = rows.size(0), n = rows.size(1);
  const float* x = rows.const_data_ptr<float>();
  const Steps steps(search);
  const Tensor best = at::ones({count});
  float* out = best.mutable_data_ptr<float>();
  const auto choose = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* weighting =
          importance.defined() ? importance.const_data_ptr<float>() + row % importance.size(0) * n : nullptr;
      const float* values = x + row * n;
      out[row] =
          best_ratio({values, weighting, n, find_range(values, n), spec, steps, static_cast<float>(search.norm)});
    }
  };
  // Few long rows are shared out by pieces instead.
  if (constexpr int64_t kFewRows = 64; count < kFewRows && n > kPiece) {
    choose(0, count);
  } else {
    at::parallel_for(0, count, 1 + kPiece / (n * 2 * kGridsAtOnce), choose);
  }
  return best;
}

/// The same of any device and type by tensor operations.
Tensor composite_best_ratios(const Tensor& rows, const QuantSpec& spec, const MseSearch& search,
                             const Tensor& importance) {
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor weighting = importance.defined()
                               ? importance.to(rows.scalar_type()).repeat({rows.size(0) / importance.size(0), 1})
                               : Tensor();
  const auto ratio_at = [&](const Tensor& step) { return 1 - step * (search.max_shrink / search.num_steps); };
  // step: [rows, 1]
  const auto loss_at = [&](const Tensor& step) {
    const QParams qparams = compute_qparams(rows, spec, ratio_at(step).to(rows.scalar_type()).unsqueeze(-1));
    Tensor loss = (rows - fake_quantize(rows, qparams, spec)).abs_().pow_(search.norm);
    if (weighting.defined()) loss *= weighting;
    return loss.sum(-1, /*keepdim=*/true).nan_to_num_(infinity, infinity);
  };
  const Steps steps(search);
  const at::TensorOptions doubles = rows.options().dtype(at::kDouble);
  std::vector<Tensor> losses;
  for (const int64_t step : steps.first) losses.push_back(loss_at(at::full({rows.size(0), 1}, step, doubles)));
  const Tensor all = at::cat(losses, 1);
  Tensor best = all.argmin(1, /*keepdim=*/true), least = all.gather(1, best);
  const Tensor second = all.scatter(1, best, infinity).argmin(1, /*keepdim=*/true).to(doubles) * steps.stride;
  best = best.to(doubles) * steps.stride;
  const Tensor first = best;
  for (int64_t distance = 1; distance < steps.stride; ++distance) {
    for (const Tensor& step : {first - distance, first + distance, second - distance, second + distance}) {
      const Tensor inside = step.clamp(0, search.num_steps - 1), loss = loss_at(inside);
      const Tensor better = (loss < least).logical_or_((loss == least).logical_and_(inside < best));
      best = at::where(better, inside, best);
      least = at::where(better, loss, least);
    }
  }
  return ratio_at(best).to(rows.scalar_type());
}

}  // namespace

QParams search_qparams(const Tensor& x, const QuantSpec& spec, const MseSearch& search, const Tensor& importance) {
  check_spec("search_qparams", spec);
  TORCH_CHECK(search.num_steps >= 1 && search.norm > 0 && search.max_shrink >= 0 && search.max_shrink <= 1,
              "search_qparams: num_steps is ", search.num_steps, ", norm ", search.norm, " and max_shrink ",
              search.max_shrink, ", expected at least 1, above 0 and 0 to 1");
  TORCH_CHECK(!importance.defined() || (importance.dim() == 1 && importance.size(0) == x.size(-1)),
              "search_qparams: importance is ", importance.sizes(), ", expected [", x.size(-1), "]");
  if (search.method == MseSearch::Method::kHalfQuadratic) return half_quadratic_qparams(x, spec);
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
