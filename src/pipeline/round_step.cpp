#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "../quant/finite.h"
#include "../quant/input_factor.h"
#include "../quant/product.h"
#include "block_walk.h"
#include "cluster/messages.h"
#include "pipeline/activation_ranges.h"
#include "pipeline/divided_rounding.h"
#include "steps.h"

namespace baseq {
namespace {

using LowRank = LowRankOptions::Method;

struct Statistics {
  bool known = true;      ///< false where no input is finite or the sums are not: then all inputs count as alike
  Tensor hessian;         ///< E[x^T x], float64; undefined where there are `tokens`
  Tensor tokens;          ///< the same as x^T x, float32 [num_tokens, features]: of few tokens, see few_tokens()
  Tensor cross;           ///< E[(x_fp - x)^T x]; undefined unless the step compensates streams
  Tensor mean_magnitude;  ///< E|x|; undefined unless the low-rank correction asks for it
  std::optional<InputFactor> factor{};  ///< for GPTQ; see factor_of()
};

/// The sums of `collect` over `total`, the weight of all tokens that counted.
void finish(Statistics& sums, double total) {
  for (Tensor* moment : {&sums.hessian, &sums.cross, &sums.mean_magnitude}) {
    if (!moment->defined()) continue;
    moment->div_(total);
    sums.known = sums.known && all_finite(*moment);
  }
  if (sums.tokens.defined()) {
    sums.tokens.div_(std::sqrt(total));
    sums.known = sums.known && all_finite(sums.tokens);
  }
  if (sums.known) return;
  const Tensor& any = sums.tokens.defined() ? sums.tokens : sums.hessian;
  sums = {.known = false,
          .hessian = at::eye(any.size(1), any.options().dtype(at::kDouble)),
          .mean_magnitude = sums.mean_magnitude.defined() ? at::ones_like(sums.mean_magnitude) : Tensor()};
}

/// Weighted second moments of what the readers of `site` see.
/// @param everywhere false: for the first process alone; others know only whether they are known
Statistics collect(Site site, const DecoderLayer& layer, const DecoderLayer& unrounded, const RoundStep& step,
                   const BlockTask& task, BlockWalk& walk, bool everywhere) {
  const BlockInputs& inputs = task.inputs;
  const Shards& shards = inputs.pass.shards;
  Statistics result;
  WindowSum hessian(shards), cross(shards), mean_magnitude(shards), dropped(shards);
  const bool magnitudes = step.low_rank && step.low_rank->method == LowRank::kL2qer;
  const int64_t num_windows = shards.num_windows(task.token_weights), seq_len = task.token_weights.size(1);
  Tensor tokens;  // of this process, [num_windows, seq, features]
  const auto add = [&](int64_t begin, const Tensor& seen) {
    Tensor x = seen.flatten(0, 1), full;
    Tensor weight = task.token_weights.narrow(0, begin, seen.size(0)).reshape({-1, 1});
    if (step.compensate_streams) {
      full = inputs.full_precision.narrow(0, begin, seen.size(0)).to(inputs.compute());
      full = unrounded.input_of(site, full, inputs.rope).flatten(0, 1);
    }
    if (const Tensor weights = drop_tokens_not_finite({&x, &full}, weight); weights.defined()) {
      dropped.add(begin, weights);
    }
    if (takes_tokens(step, num_windows * seq_len, x.size(1))) {
      if (!tokens.defined()) tokens = at::empty({task.token_weights.size(0), seq_len, x.size(1)}, x.options());
      tokens.narrow(0, begin, seen.size(0)).flatten(0, 1).copy_(x).mul_(weight.sqrt());
      return;
    }
    const bool alike = weight.is_cpu() && weight.eq(1).all().item<bool>();  // elsewhere looking takes longer
    hessian.add(begin, moment_product(x, alike ? Tensor() : weight));
    if (!magnitudes && !full.defined()) return;
    const Tensor weighted = alike ? x : x * weight;
    if (magnitudes) mean_magnitude.add(begin, weighted.abs().sum(0, /*keepdim=*/false, at::kDouble));
    if (full.defined()) cross.add(begin, matrix_product((full - x).t(), weighted));
  };
  walk.visit(site, layer, add);
  if (tokens.defined()) {
    const Tensor all = everywhere ? shards.all(tokens) : shards.gather(tokens);
    if (all.defined()) result.tokens = all.flatten(0, 1).to(tokens.device());
  }
  result.hessian = hessian.total(everywhere);
  result.mean_magnitude = mean_magnitude.total(everywhere);
  result.cross = cross.total(everywhere);
  const Tensor left_out = dropped.total();
  const double total = weight_of_all(task.token_weights, shards);
  const Communicator& communicator = shards.communicator();
  if (everywhere || communicator.is_first()) {
    finish(result, left_out.defined() ? total - left_out.item<double>() : total);
  }
  if (!everywhere) result.known = broadcast(communicator, at::scalar_tensor(result.known, at::kBool)).item<bool>();
  return result;
}

/// What GPTQ needs of the inputs, computed for the first of their readers.
const InputFactor& factor_of(Statistics& statistics, const GptqOptions& options) {
  if (statistics.factor) return *statistics.factor;
  if (statistics.tokens.defined()) {
    const Tensor tokens = std::exchange(statistics.tokens, Tensor()).to(at::kFloat);
    statistics.factor = factor_tokens(tokens, options);
    if (statistics.factor->defined()) return *statistics.factor;
    statistics.hessian = symmetric_product(tokens, tokens).to(at::kDouble);
  }
  statistics.factor = factor_moments(statistics.hessian, options, statistics.cross);
  statistics.cross = Tensor();
  return *statistics.factor;
}

/// The error of the linear's output over the inputs that `hessian` describes, or of its weight when that is undefined.
double relative_error(const Tensor& weight, const Linear& rounded, const Tensor& hessian) {
  const Tensor source = weight.to(at::kFloat), error = source - rounded.dequantized();
  if (!hessian.defined())
    return source.any().item<bool>() ? (error.square().sum() / source.square().sum()).item<double>() : 0;
  const double energy = quadratic_form(source, hessian);
  return energy > 0 ? quadratic_form(error, hessian) / energy : 0;
}

/// The moments that weigh the error of a weight, see reconstruct_error.
Tensor moments_for(LowRank method, const Statistics& statistics) {
  switch (method) {
    case LowRank::kSvd:
      return {};
    case LowRank::kL2qer:
      return statistics.mean_magnitude.square();
    case LowRank::kQeraApprox:
      return statistics.hessian.diagonal();
    case LowRank::kQeraExact:
    case LowRank::kFbquant:
      return statistics.hessian;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LowRankOptions::Method");
}

WeightState round_with_fbquant(const Tensor& weight, const RoundStep& step, const QuantSpec& spec,
                               const Tensor& moments, uint64_t seed) {
  FbquantOptions options{.start = step.low_rank->start,
                         .rank = step.low_rank->rank,
                         .steps = step.low_rank->steps,
                         .mse_clip = step.gptq.mse_clip,
                         .search = step.gptq.search,
                         .learning_rate = step.low_rank->learning_rate,
                         .dtype = step.low_rank->dtype,
                         .seed = seed};
  FbquantResult result = fbquant(weight, moments, spec, options);
  return {.codes = std::move(result.weight), .low_rank = std::move(result.lora)};
}

QuantizedWeight round_to_nearest(const Tensor& weight, const Tensor& clip, const QuantSpec& spec,
                                 const GptqOptions& options) {
  if (!clip.defined()) return baseq::round_to_nearest(weight, spec, options.mse_clip, options.search);
  const QParams qparams = compute_qparams(weight, spec, clip);
  return {.spec = spec, .codes = quantize(weight, qparams, spec), .qparams = qparams};
}

/// A correction for the part of `weight` that the codes lack.
LowRankFactors correction(const Tensor& weight, const QuantizedWeight& codes, const LowRankOptions& options,
                          const Statistics& statistics) {
  const Tensor rounded = codes.dequantized();
  const LowRankCorrection found =
      reconstruct_error(weight.to(rounded.options()) - rounded, moments_for(options.method, statistics), options.rank);
  return store_factors(found.A, found.B, options.dtype);
}

/// Rounds one linear of `block`.
RoundedLinear round_linear_of(OpenBlock& block, const std::string& name, const RoundStep& step, Statistics& statistics,
                              const BlockTask& task) {
  const bool gptq_rounding = step.method == RoundStep::Method::kGptq;
  const bool learned = step.low_rank && step.low_rank->method == LowRank::kFbquant;
  const auto start = std::chrono::steady_clock::now();
  const QuantSpec& spec = *task.grids.weights_of(name);
  const Tensor weight = block.layer().linear(name).weight;
  RoundedLinear result;
  LinearRounded event{.block = task.place.block, .name = name};
  const auto known = block.state().weights.find(name);
  WeightState state = known == block.state().weights.end() ? WeightState{} : known->second.unrounded();
  if (learned) {
    WeightState found = round_with_fbquant(weight, step, spec, statistics.hessian, task.seed);
    state.codes = std::move(found.codes);
    state.low_rank = std::move(found.low_rank);
  } else if (gptq_rounding) {
    TORCH_CHECK(!state.clip.defined(), "round: \"gptq\" has no use for learned clips of weights; use \"rtn\"");
    GptqResult found = gptq(weight, factor_of(statistics, step.gptq), spec, step.gptq);
    if (found.fell_back_to_rtn) {
      result.events.push_back(
          Warning{"block " + std::to_string(event.block) + ", " + name +
                  ": the Hessian has no Cholesky factor at any damping; rounded to nearest instead"});
    }
    event.relative_error = found.relative_error;
    event.damping = found.damping;
    state.codes = std::move(found.weight);
  } else {
    state.codes = round_to_nearest(weight, state.clip, spec, step.gptq);
  }
  if (step.low_rank && !learned) state.low_rank = correction(weight, *state.codes, *step.low_rank, statistics);
  result.state = state;
  block.round(name, std::move(state));
  if (step.low_rank || !gptq_rounding) {
    event.relative_error = relative_error(weight, block.layer().linear(name), statistics.hessian);
  }
  event.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.events.push_back(event);
  return result;
}

DecoderLayer with_points(DecoderLayer layer, bool enabled) {
  layer.for_each_quant_point([&](const std::string&, QuantPoint& point) { point.enabled = point.enabled && enabled; });
  return layer;
}

bool has_enabled_point(const DecoderLayer& layer) {
  bool found = false;
  layer.for_each_quant_point([&](const std::string&, const QuantPoint& point) { found = found || point.enabled; });
  return found;
}

}  // namespace

bool takes_tokens(const RoundStep& step, int64_t num_tokens, int64_t features) {
  return step.method == RoundStep::Method::kGptq && !step.compensate_streams && !step.low_rank &&
         few_tokens(num_tokens, features, step.gptq);
}

void apply(const RoundStep& step, OpenBlock& block, const BlockTask& task) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(task.grids.weights, "round: the recipe gives no weight grid");
  const auto is_rounded = [&](std::string_view linear) {
    return task.grids.weights_of(std::string(linear)).has_value();
  };
  const bool moments = needs_moments(step);
  TORCH_CHECK(!moments || task.inputs.defined(),
              "round: GPTQ and low-rank corrections other than \"svd\" need calibration inputs");
  if (has_codes(block.state())) {  // an earlier pass rounded them: begin again from the exact weights
    block.edit([](BlockState& state) {
      for (auto& [name, weight] : state.weights) weight = weight.unrounded();
    });
  }
  block.layer();
  block.forget_original();
  DecoderLayer unrounded;  // held, and with it the exact weights, only where it is asked for
  if (step.compensate_streams) unrounded = with_points(block.layer(), false);
  bool all_known = true;
  BlockWalk walk(task);
  OpenBlock::Passed passed;
  for (const SiteInfo& info : sites()) {
    if (!info.is_input()) continue;
    std::vector<std::string> rounded;
    for (const std::string_view reader : info.readers) {
      if (is_rounded(reader)) rounded.emplace_back(reader);
    }
    Statistics statistics;
    if (moments) {
      // Its activation quantizers are off unless the step wants them while rounding.
      DecoderLayer layer = with_points(block.layer(), step.quantized_inputs);
      if (!has_enabled_point(block.layer())) observe_ranges(layer, passed.ranges);
      if (!rounded.empty()) {
        // One linear alone is rounded by the first process, see owners_by_work().
        statistics = collect(info.site, layer, unrounded, step, task, walk, /*everywhere=*/rounded.size() > 1);
      } else {
        walk.visit(info.site, layer, [](int64_t, const Tensor&) {});
      }
    }
    if (all_known && !statistics.known) {
      task.tell(
          Warning{"block " + std::to_string(task.place.block) + ", " + std::string(info.readers[0]) +
                  ": its calibration inputs are not finite; where that is so, weights are rounded as if all inputs "
                  "were alike"});
    }
    all_known = all_known && statistics.known;
    round_divided(rounded, block, task, [&](const std::string& name) {
      task.inputs.pass.step();
      return round_linear_of(block, name, step, statistics, task);
    });
  }
  if (moments && !has_enabled_point(block.layer())) {
    passed.after_attention = walk.after_attention();
    block.keep_passed(std::move(passed));
  }
}

}  // namespace baseq
