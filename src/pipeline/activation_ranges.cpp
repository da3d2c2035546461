#include "pipeline/activation_ranges.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

namespace baseq {
namespace {

/// Of rows of `row_size` values.
ActivationRange range_of(const Tensor& values, int64_t row_size) {
  const Tensor rows = values.reshape({-1, row_size}).to(at::kFloat);
  const Tensor rms = rows.square().mean(-1).sqrt();
  const Tensor peak = rows.abs().amax(-1) / rms.clamp_min(1e-30);
  const Tensor mean_square = rows.square().mean(at::IntArrayRef{}, /*keepdim=*/false, at::kDouble);
  const Tensor found =
      at::stack({rows.min().to(at::kDouble), rows.max().to(at::kDouble), mean_square, peak.mean(at::kDouble)})
          .cpu();  // in one copy
  const auto* values_found = found.const_data_ptr<double>();
  return {.min = values_found[0],
          .max = values_found[1],
          .rms = std::sqrt(values_found[2]),
          .peak = values_found[3],
          .difficulty = difficulty(values)};
}

}  // namespace

double difficulty(const Tensor& values) {
  const Tensor norms = values.reshape({-1, values.size(-1)}).square().sum(0, /*keepdim=*/false, at::kDouble).sqrt();
  return norms.std(/*unbiased=*/false).item<double>();
}

void observe_ranges(DecoderLayer& layer, std::map<std::string, ActivationRange>& ranges) {
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    QuantPoint& point = layer.point(info.site);
    // A point that is off and gives its shift back shows x, one that does not shows x - shift.
    const Tensor hidden = point.add_shift_back ? point.shift : Tensor();
    const auto [groups, features] = layer.shape(info.site);
    point.enabled = false;
    point.observer = [&ranges, name = std::string(info.point), hidden, row_size = features / groups](const Tensor& x) {
      if (!ranges.contains(name)) ranges[name] = range_of(hidden.defined() ? x - hidden : x, row_size);
    };
  }
}

std::map<std::string, ActivationRange> activation_ranges(const DecoderLayer& layer, const Tensor& windows,
                                                         const RotaryEmbedding& rope) {
  const c10::NoGradGuard no_grad;
  DecoderLayer probe = layer;
  std::map<std::string, ActivationRange> ranges;
  observe_ranges(probe, ranges);
  probe.input_of(Site::kDown, windows, rope);
  return ranges;
}

std::vector<PointMeasured> measure_points(int64_t block, const std::map<std::string, ActivationRange>& before,
                                          const std::map<std::string, ActivationRange>& after,
                                          const DecoderLayer& layer) {
  std::vector<PointMeasured> points;
  layer.for_each_quant_point([&](const std::string& name, const QuantPoint& point) {
    PointMeasured measured{
        .block = block, .name = name, .before = before.at(name), .after = after.at(name), .enabled = point.enabled};
    if (point.enabled && point.clip.defined()) {
      const Tensor clip = point.clip.to(at::kCPU, at::kDouble).contiguous().flatten();
      measured.clip.assign(clip.const_data_ptr<double>(), clip.const_data_ptr<double>() + clip.numel());
    }
    if (point.gain.defined()) {
      measured.min_gain = point.gain.min().item<double>();
      measured.max_gain = point.gain.max().item<double>();
    }
    if (point.shift.defined()) measured.max_shift = point.shift.abs().max().item<double>();
    points.push_back(std::move(measured));
  });
  return points;
}

}  // namespace baseq
