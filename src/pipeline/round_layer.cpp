#include "baseq/pipeline/round_layer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <chrono>
#include <cmath>

namespace baseq {
namespace {

/// Enough for efficient matrix products, little beside a block's weights.
constexpr int64_t kTokensPerBatch = 2048;

struct Statistics {
  Tensor hessian;  ///< E[x^T x], float64
  Tensor cross;    ///< E[(x_fp - x)^T x], float64; undefined unless the recipe compensates streams
};

/// Second moments of what the readers of `point` see.
Statistics collect(InputPoint point, const DecoderLayer& layer, const DecoderLayer& original, const Recipe& recipe,
                   const BlockInputs& inputs) {
  std::optional<Hessian> hessian;
  Tensor cross;
  for_each_batch(inputs.quantized, [&](int64_t begin, const Tensor& windows) {
    const Tensor x = layer.input_of(point, windows, inputs.rope).flatten(0, 1);
    if (!hessian) hessian.emplace(x.size(1), x.device());
    hessian->add(x);
    if (!recipe.compensate_streams) return;
    const Tensor full = inputs.full_precision.narrow(0, begin, windows.size(0));
    const Tensor drift = original.input_of(point, full, inputs.rope).flatten(0, 1) - x;
    const Tensor product = at::matmul(drift.t(), x).to(at::kDouble);
    cross = cross.defined() ? cross.add_(product) : product;
  });
  Statistics statistics{.hessian = hessian->mean(), .cross = {}};
  if (cross.defined()) statistics.cross = cross / static_cast<double>(hessian->num_tokens());
  if (recipe.hessian_shrinkage > 0) {
    const auto shrink = [&](const Tensor& moments) {
      return moments * (1 - recipe.hessian_shrinkage) + at::diag(moments.diagonal()) * recipe.hessian_shrinkage;
    };
    statistics.hessian = shrink(statistics.hessian);
    if (statistics.cross.defined()) statistics.cross = shrink(statistics.cross);
  }
  return statistics;
}

double relative_weight_error(const Tensor& weight, const QuantizedWeight& rounded) {
  const Tensor error = weight.to(at::kFloat) - rounded.dequantized().to(weight.device());
  return (error.square().sum() / weight.to(at::kFloat).square().sum()).item<double>();
}

void set_quant_points(DecoderLayer& layer, bool enabled) {
  layer.for_each_quant_point([&](const std::string&, QuantPoint& point) { point.enabled = point.enabled && enabled; });
}

}  // namespace

void for_each_batch(const Tensor& stream, const std::function<void(int64_t, const Tensor&)>& fn) {
  const int64_t batch = std::max<int64_t>(1, kTokensPerBatch / stream.size(1));
  for (int64_t begin = 0; begin < stream.size(0); begin += batch) {
    fn(begin, stream.narrow(0, begin, std::min(batch, stream.size(0) - begin)));
  }
}

Tensor advance(const DecoderLayer& layer, const Tensor& stream, const RotaryEmbedding& rope) {
  const c10::NoGradGuard no_grad;
  Tensor result = at::empty_like(stream);
  for_each_batch(stream, [&](int64_t begin, const Tensor& windows) {
    result.narrow(0, begin, windows.size(0)).copy_(layer.forward(windows, rope));
  });
  return result;
}

void round_layer(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, int64_t block,
                 const ProgressFn& progress) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(recipe.weights, "round_layer: the recipe gives no weight grid");
  const bool gptq_rounding = recipe.rounding == Recipe::Rounding::kGptq;
  TORCH_CHECK(!gptq_rounding || inputs.defined(), "round_layer: GPTQ needs calibration inputs");
  DecoderLayer original = layer;
  set_quant_points(original, false);
  // What the inputs pass on their way: the points are off unless the recipe wants them while rounding. Weights are
  // replaced in both as they are rounded.
  DecoderLayer seen = layer;
  set_quant_points(seen, recipe.quantized_inputs);

  const auto round = [&](InputPoint point, std::initializer_list<const char*> readers) {
    Statistics statistics;
    if (gptq_rounding) statistics = collect(point, seen, original, recipe, inputs);
    layer.for_each_linear([&](const std::string& name, Linear& linear) {
      if (std::find(readers.begin(), readers.end(), name) == readers.end()) return;
      const auto start = std::chrono::steady_clock::now();
      LinearRounded event{.block = block, .name = name, .relative_error = 0, .damping = 0, .seconds = 0};
      if (gptq_rounding) {
        GptqResult result = gptq(linear.weight, statistics.hessian, *recipe.weights, recipe.gptq, statistics.cross);
        if (result.fell_back_to_rtn && progress) {
          progress(Warning{"block " + std::to_string(block) + ", " + name +
                           ": the Hessian has no Cholesky factor at any damping; rounded to nearest instead"});
        }
        event.relative_error = result.relative_error;
        event.damping = result.damping;
        linear.quantized = std::move(result.weight);
      } else {
        linear.quantized = round_to_nearest(linear.weight, *recipe.weights, recipe.gptq.mse_clip, recipe.gptq.search);
        event.relative_error = relative_weight_error(linear.weight, *linear.quantized);
      }
      linear.weight = linear.quantized->dequantized().to(linear.weight.options());
      seen.for_each_linear([&](const std::string& other, Linear& target) {
        if (other == name) target.weight = linear.weight;
      });
      event.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (progress) progress(event);
    });
  };
  round(InputPoint::kQkv, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"});
  round(InputPoint::kO, {"self_attn.o_proj"});
  round(InputPoint::kGateUp, {"mlp.gate_proj", "mlp.up_proj"});
  round(InputPoint::kDown, {"mlp.down_proj"});
}

}  // namespace baseq
