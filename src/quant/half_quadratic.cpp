#include "half_quadratic.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "cells.h"
#include "grid.h"

namespace baseq {
namespace {

/// Values of a piece: a few temporaries of its size live at a time.
constexpr int64_t kPieceValues = int64_t{1} << 22;

/// sign(x) max(0, |x| - |x|^(p - 1) / beta), the generalized soft threshold.
Tensor shrink(const Tensor& x, double norm, double strength) {
  const Tensor size = x.abs();
  return x.sign() * (size - size.pow(norm - 1) / strength).clamp_min(0).nan_to_num(0.0);
}

/// Half-quadratic splitting of rows [rows, n] that have a grid each.
class Splitting {
 public:
  Splitting(const Tensor& rows, const QuantSpec& spec, const HalfQuadratic& options)
      : rows_(rows), spec_(spec), options_(options) {}

  QParams run() {
    QParams qparams = compute_qparams(rows_, spec_);
    best_ = qparams;
    least_ = error_of(qparams);
    Tensor real_zero = qparams.zero_point;
    double strength = options_.strength;
    for (int64_t i = 0; i < options_.num_iterations; ++i, strength *= options_.growth) {
      qparams = next(qparams, real_zero, strength);
      keep(qparams);
    }
    return best_;
  }

 private:
  Tensor error_of(const QParams& qparams) const {
    return (rows_ - fake_quantize(rows_, qparams, spec_)).abs().pow(options_.norm).sum(-1, /*keepdim=*/true);
  }

  /// @param real_zero the zero point before it is rounded, updated
  QParams next(const QParams& now, Tensor& real_zero, double strength) const {
    const Tensor position = rows_ / now.scale;
    Tensor codes = quantize(rows_, now, spec_).to(rows_.scalar_type());
    const Tensor centred = real_zero.defined() ? codes - now.zero_point : codes;
    const Tensor kept = shrink(position - centred, options_.norm, strength);
    const Tensor fitted = position - kept;  // what the codes should be nearest to in the mean of squares
    QParams result;
    if (real_zero.defined()) real_zero = (codes - fitted).mean(-1, /*keepdim=*/true);
    if (real_zero.defined()) result.zero_point = round_zero_point(real_zero, spec_);
    const Tensor levels = real_zero.defined() ? codes - result.zero_point : codes;
    const Tensor energy = levels.square().sum(-1, /*keepdim=*/true);
    const Tensor share = (fitted * levels).sum(-1, /*keepdim=*/true) / energy;
    const Tensor usable = share.isfinite().logical_and(share.gt(0));
    result.scale = round_scale(at::where(usable, now.scale * share, now.scale), spec_);
    return result;
  }

  void keep(const QParams& qparams) {
    const Tensor error = error_of(qparams), better = error.lt(least_);
    least_ = at::where(better, error, least_);
    best_.scale = at::where(better, qparams.scale, best_.scale);
    if (best_.zero_point.defined()) best_.zero_point = at::where(better, qparams.zero_point, best_.zero_point);
  }

  const Tensor& rows_;
  const QuantSpec& spec_;
  const HalfQuadratic& options_;
  QParams best_;
  Tensor least_;  ///< its error, [rows, 1]
};

}  // namespace

QParams half_quadratic_qparams(const Tensor& x, const QuantSpec& spec, const HalfQuadratic& options) {
  check_weight_spec("half_quadratic_qparams", spec);
  const at::NoGradGuard no_grad;
  const Tensor grouped = group_view(x, spec);
  const int64_t groups = grouped.size(1), n = grouped.size(2), count = grouped.size(0) * groups;
  TORCH_CHECK(n > 0, "half_quadratic_qparams: tensor of size ", x.sizes(), " has empty groups");
  QuantSpec per_row = spec;
  per_row.strategy = Strategy::kChannel;
  const Tensor rows = grouped.reshape({count, n}).to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  std::vector<Tensor> scales, zero_points;
  const int64_t piece = std::max<int64_t>(1, kPieceValues / n);
  for (int64_t begin = 0; begin < count; begin += piece) {
    const Tensor part = rows.slice(0, begin, std::min(begin + piece, count));
    const QParams found = Splitting(part, per_row, options).run();
    scales.push_back(found.scale);
    if (found.zero_point.defined()) zero_points.push_back(found.zero_point);
  }
  const auto joined = [&](const std::vector<Tensor>& parts) {
    return parts.empty() ? Tensor() : at::cat(parts).view({grouped.size(0), groups});
  };
  return {joined(scales), joined(zero_points)};
}

}  // namespace baseq
