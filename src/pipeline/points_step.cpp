#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "steps.h"

namespace baseq {

void apply(const PointsStep& step, OpenBlock& block, const BlockTask& task) {
  const c10::NoGradGuard no_grad;
  using Shift = PointsStep::Shift;
  const BlockMoments* moments = nullptr;
  if (step.shift == Shift::kMean) {
    Site last = Site::kQkv;
    // Keys and values pass on the way to the input of o_proj.
    for (const Site site : step.at) last = std::max(last, site_info(site).cache ? Site::kO : site);
    moments = &block.moments(task, step.stream, last);
  }
  const at::TensorOptions& options = task.place.compute;
  std::map<Site, QuantPoint> points;
  for (const Site site : step.at) {
    const SiteInfo& info = site_info(site);
    const auto [groups, features] = site_shape(site, task.place.config);
    const std::optional<QuantSpec>& grid = info.cache ? task.grids.kv_cache : task.grids.input_activations;
    TORCH_CHECK(grid, "points: the recipe has no grid for ", std::string(info.name));
    QuantPoint& point = points[site];
    point.enabled = true;
    point.spec = *grid;
    point.runtime = step.runtime;
    point.clip = at::full({groups, 1}, step.clip, options);
    if (step.shift == Shift::kZero) point.shift = at::zeros({features}, options);
    if (step.shift == Shift::kMean) point.shift = moments->at(site).mean.to(options);
    // Softmax does not see a constant added to every key's logit of a query.
    if (site == Site::kQueryKey) point.add_shift_back = false;
  }
  block.edit_points([&](BlockState& state) {
    for (auto& [site, point] : points) state.points[site] = std::move(point);
  });
}

}  // namespace baseq
