#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "pipeline/activation_ranges.h"
#include "pipeline/statistics.h"
#include "recipe_rules.h"
#include "steps.h"

namespace baseq {
namespace {

using By = ChooseStep::By;
using Chain = std::vector<TransformStep>;

const std::optional<QuantSpec>& grid_at(Site site, const Grids& grids) {
  return site_info(site).cache ? grids.kv_cache : grids.input_activations;
}

Tensor rounded(const Tensor& x, const QuantSpec& spec) { return fake_quantize(x, compute_qparams(x, spec), spec); }

/// fn(name, linear) for the linears whose weights a transform at `site` can change.
template <class Layer, class Fn>
void for_each_linear_around(Layer& layer, Site site, const Fn& fn) {
  for (const auto& names : {site_info(site).readers, site_info(site).writers}) {
    for (const std::string_view name : names) fn(std::string(name), layer.linear(name));
  }
}

/// What the point at `site` sees, [tokens, features].
Tensor seen_at(Site site, const DecoderLayer& layer, const BlockTask& task) {
  DecoderLayer probe = without_quant_points(layer);
  Tensor seen;
  probe.point(site).observer = [&](const Tensor& x) { seen = x.reshape({-1, x.size(-1)}); };
  const Site last = site_info(site).cache ? Site::kO : site;  // keys and values pass on the way to it
  const Shards& shards = task.inputs.pass.shards;
  probe.input_of(last, first_windows(task.inputs.full_precision, shards).to(task.inputs.compute()), task.inputs.rope);
  return seen;
}

double block_loss(Site site, DecoderLayer layer, const BlockTask& task) {
  if (const auto& grid = grid_at(site, task.grids)) layer.point(site) = {.enabled = true, .spec = *grid};
  for_each_linear_around(layer, site, [&](const std::string& name, Linear& linear) {
    if (const auto& grid = task.grids.weights_of(name)) linear.weight = rounded(linear.weight, *grid);
  });
  const auto first = [&](const Tensor& of) { return first_windows(of, task.inputs.pass.shards); };
  const at::TensorOptions compute = task.inputs.compute();
  const Tensor output = layer.forward(first(task.inputs.full_precision).to(compute), task.inputs.rope);
  const Tensor error = (output - first(task.target).to(compute)).square().mean(-1);
  return (error * first(task.token_weights)).mean().item<double>();
}

/// Squared error of the weights around a site, and of a token there on average.
double rounding_error(Site site, const DecoderLayer& layer, const BlockTask& task) {
  double error = 0;
  const auto squared = [](const Tensor& difference) { return difference.square().sum(at::kDouble).item<double>(); };
  for_each_linear_around(layer, site, [&](const std::string& name, const Linear& linear) {
    if (const auto& grid = task.grids.weights_of(name)) error += squared(rounded(linear.weight, *grid) - linear.weight);
  });
  if (const auto& grid = grid_at(site, task.grids)) {
    const Tensor x = seen_at(site, layer, task);
    error += squared(rounded(x, *grid) - x) / static_cast<double>(x.size(0));
  }
  return error;
}

double score(By by, Site site, const DecoderLayer& layer, const BlockTask& task) {
  switch (by) {
    case By::kBlockLoss:
      return block_loss(site, layer, task);
    case By::kRoundingError:
      return rounding_error(site, layer, task);
    case By::kDifficulty:
      return difficulty(seen_at(site, layer, task));
    case By::kRms:
      return seen_at(site, layer, task).square().mean().sqrt().item<double>();
  }
  TORCH_INTERNAL_ASSERT(false, "unknown ChooseStep::By");
}

/// `block` with the transforms of a chain at `site`.
OpenBlock with_chain(const Chain& chain, Site site, OpenBlock& block, const BlockTask& task) {
  OpenBlock trial(block.state(), task.place, [&block] { return block.original(); });
  for (TransformStep step : chain) {
    step.at = {site};
    apply(step, trial, task);
  }
  return trial;
}

std::string describe(const Chain& chain) {
  std::vector<std::string> names;
  for (const TransformStep& step : chain) names.push_back(transform_name(step.kind));
  return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "));
}

}  // namespace

void apply(const ChooseStep& step, OpenBlock& block, const BlockTask& task) {
  const c10::NoGradGuard no_grad;
  for (const Site site : step.at) {
    std::vector<double> scores;
    size_t chosen = 0;
    if (step.by == By::kRms) {
      scores.push_back(score(step.by, site, block.layer(), task));
      chosen = scores[0] < step.threshold ? 0 : 1;
    } else {
      for (const Chain& chain : step.from) {
        scores.push_back(score(step.by, site, with_chain(chain, site, block, task).layer(), task));
        // Written so that NaN is not better.
        if (scores.back() < scores[chosen]) chosen = scores.size() - 1;
      }
    }
    BlockState state = with_chain(step.from[chosen], site, block, task).state();
    block.edit([&](BlockState& of) { of = std::move(state); });
    task.tell(TransformChosen{.block = task.place.block,
                              .site = std::string(site_info(site).name),
                              .chosen = static_cast<int64_t>(chosen),
                              .chain = describe(step.from[chosen]),
                              .scores = std::move(scores)});
  }
}

}  // namespace baseq
