#include "baseq/pipeline/round_layer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <chrono>
#include <cmath>

#include "../quant/finite.h"
#include "../quant/product.h"
#include "baseq/pipeline/statistics.h"

namespace baseq {
namespace {

struct Statistics {
  bool known = true;      ///< false where no input is finite or the sums are not: then all inputs count as alike
  Tensor hessian;         ///< E[x^T x], float64
  Tensor cross;           ///< E[(x_fp - x)^T x]; undefined unless the recipe compensates streams
  Tensor mean_magnitude;  ///< E|x|; undefined unless the low-rank correction asks for it
};

void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum.add_(term) : term.to(at::kDouble); }

/// Weighted second moments of what the readers of `site` see.
Statistics collect(Site site, const DecoderLayer& layer, const DecoderLayer& original, const Recipe& recipe,
                   const BlockInputs& inputs, const Tensor& weights) {
  Statistics result;
  const bool magnitudes = recipe.low_rank && recipe.low_rank->method == Recipe::LowRank::Method::kL2qer;
  double dropped = 0;
  const auto add = [&](int64_t begin, const Tensor& windows) {
    Tensor x = layer.input_of(site, windows, inputs.rope).flatten(0, 1), full;
    Tensor weight = weights.narrow(0, begin, windows.size(0)).reshape({-1, 1});
    if (recipe.compensate_streams) {
      full = inputs.full_precision.narrow(0, begin, windows.size(0)).to(inputs.compute());
      full = original.input_of(site, full, inputs.rope).flatten(0, 1);
    }
    dropped += drop_tokens_not_finite({&x, &full}, weight);
    const Tensor weighted = x * weight;
    accumulate(result.hessian, matrix_product(weighted.t(), x));
    if (magnitudes) accumulate(result.mean_magnitude, weighted.abs().sum(0, /*keepdim=*/false, at::kDouble));
    if (full.defined()) accumulate(result.cross, matrix_product((full - x).t(), weighted));
  };
  for_each_batch(inputs.quantized, inputs.compute(), add, inputs.pass);
  const double total = weights.sum(at::kDouble).item<double>() - dropped;
  for (Tensor* moment : {&result.hessian, &result.cross, &result.mean_magnitude}) {
    if (!moment->defined()) continue;
    moment->div_(total);
    result.known = result.known && all_finite(*moment);
  }
  if (!result.known) {
    result.hessian = at::eye(result.hessian.size(0), result.hessian.options());
    result.mean_magnitude = magnitudes ? at::ones_like(result.mean_magnitude) : Tensor();
    result.cross = Tensor();
  }
  return result;
}

/// Of the linear's output over the inputs that `hessian` describes, or of its weight when that is undefined.
double relative_error(const Tensor& weight, const Linear& rounded, const Tensor& hessian) {
  const Tensor source = weight.to(at::kFloat), error = source - rounded.dequantized().to(source.device());
  if (!hessian.defined())
    return source.any().item<bool>() ? (error.square().sum() / source.square().sum()).item<double>() : 0;
  const double energy = quadratic_form(source, hessian);
  return energy > 0 ? quadratic_form(error, hessian) / energy : 0;
}

/// What the error of a weight is measured with, see reconstruct_error.
Tensor moments_for(Recipe::LowRank::Method method, const Statistics& statistics) {
  switch (method) {
    case Recipe::LowRank::Method::kSvd:
      return {};
    case Recipe::LowRank::Method::kL2qer:
      return statistics.mean_magnitude.square();
    case Recipe::LowRank::Method::kQeraApprox:
      return statistics.hessian.diagonal();
    case Recipe::LowRank::Method::kQeraExact:
    case Recipe::LowRank::Method::kFbquant:
      return statistics.hessian;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LowRank::Method");
}

/// Rounds `linear` and gives it its correction.
void round_with_fbquant(Linear& linear, const Recipe& recipe, const Tensor& moments) {
  FbquantOptions options = recipe.low_rank->fbquant;
  options.rank = recipe.low_rank->rank;
  options.dtype = recipe.low_rank->dtype;
  options.mse_clip = recipe.gptq.mse_clip;
  options.search = recipe.gptq.search;
  FbquantResult result = fbquant(linear.weight, moments, *recipe.weights, options);
  linear.quantized = std::move(result.weight);
  linear.lora = std::move(result.lora);
}

/// Gives the rounded `linear` the correction of what its codes lack of `weight`.
void add_low_rank(Linear& linear, const Tensor& weight, const Recipe::LowRank& options, const Statistics& statistics) {
  const Tensor rounded = linear.quantized->dequantized();
  const LowRankCorrection correction =
      reconstruct_error(weight.to(rounded.options()) - rounded, moments_for(options.method, statistics), options.rank);
  linear.lora = store_factors(correction.A, correction.B, options.dtype);
}

/// Rounds `linear` and fills in what `event` says of it.
LinearRounded round_linear(Linear& linear, LinearRounded event, const Recipe& recipe, const Statistics& statistics,
                           const ProgressFn& progress) {
  const bool gptq_rounding = recipe.rounding == Recipe::Rounding::kGptq;
  const bool learned = recipe.low_rank && recipe.low_rank->method == Recipe::LowRank::Method::kFbquant;
  const auto start = std::chrono::steady_clock::now();
  const Tensor weight = linear.weight;
  if (learned) {
    round_with_fbquant(linear, recipe, statistics.hessian);
  } else if (gptq_rounding) {
    GptqResult result = gptq(weight, statistics.hessian, *recipe.weights, recipe.gptq, statistics.cross);
    if (result.fell_back_to_rtn && progress) {
      progress(Warning{"block " + std::to_string(event.block) + ", " + event.name +
                       ": the Hessian has no Cholesky factor at any damping; rounded to nearest instead"});
    }
    event.relative_error = result.relative_error;
    event.damping = result.damping;
    linear.quantized = std::move(result.weight);
  } else {
    linear.quantized = round_to_nearest(weight, *recipe.weights, recipe.gptq.mse_clip, recipe.gptq.search);
  }
  if (recipe.low_rank && !learned) add_low_rank(linear, weight, *recipe.low_rank, statistics);
  if (recipe.low_rank || !gptq_rounding) event.relative_error = relative_error(weight, linear, statistics.hessian);
  linear.weight = linear.dequantized().to(weight.options());
  event.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return event;
}

void set_quant_points(DecoderLayer& layer, bool enabled) {
  layer.for_each_quant_point([&](const std::string&, QuantPoint& point) { point.enabled = point.enabled && enabled; });
}

}  // namespace

void round_layer(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights,
                 int64_t block, const ProgressFn& progress) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(recipe.weights, "round_layer: the recipe gives no weight grid");
  const bool moments = recipe.rounding_needs_moments();
  TORCH_CHECK(!moments || inputs.defined(),
              "round_layer: GPTQ and low-rank corrections other than \"svd\" need calibration inputs");
  DecoderLayer original;  // held, and with it the unrounded weights, only where it is asked
  if (recipe.compensate_streams) original = layer;
  set_quant_points(original, false);
  // What the inputs pass on their way: the points are off unless the recipe wants them while rounding. Weights are
  // replaced in both as they are rounded.
  DecoderLayer seen = layer;
  set_quant_points(seen, recipe.quantized_inputs);

  bool all_known = true;
  for (const SiteInfo& info : sites()) {
    if (!info.is_input()) continue;
    Statistics statistics;
    if (moments) statistics = collect(info.site, seen, original, recipe, inputs, weights);
    if (all_known && !statistics.known && progress) {
      progress(
          Warning{"block " + std::to_string(block) + ", " + std::string(info.readers[0]) +
                  ": its calibration inputs are not finite; where that is so, weights are rounded as if all inputs "
                  "were alike"});
    }
    all_known = all_known && statistics.known;
    for (const std::string_view reader : info.readers) {
      const std::string name(reader);
      Linear& linear = layer.linear(name);
      inputs.pass.step();
      const LinearRounded event = round_linear(linear, {.block = block, .name = name}, recipe, statistics, progress);
      seen.linear(name).weight = linear.weight;
      if (progress) progress(event);
    }
  }
}

}  // namespace baseq
