#include "baseq/pipeline/start_points.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "baseq/pipeline/statistics.h"

namespace baseq {
namespace {

/// How one point starts.
struct Start {
  QuantPoint* point;
  const Recipe::Activations* activations;
  Recipe::Shift shift;
  int64_t groups, features;
  Moments BlockMoments::*moments;  ///< of what it sees
  InputPoint reached_at;           ///< a pass that ends here has come by
};

std::vector<Start> starts_of(DecoderLayer& layer, const Recipe& recipe) {
  std::vector<Start> starts;
  Attention& attention = layer.self_attn;
  if (const auto& activations = recipe.input_activations) {
    const auto add = [&](InputPoint at, QuantPoint& point, Recipe::Shift shift, const Linear& reader,
                         Moments BlockMoments::*moments) {
      starts.push_back({&point, &*activations, shift, /*groups=*/1, reader.weight.size(1), moments, at});
    };
    add(InputPoint::kQkv, attention.input, activations->norm_shift, attention.q_proj, &BlockMoments::qkv);
    add(InputPoint::kO, attention.o_input, activations->shift, attention.o_proj, &BlockMoments::o);
    add(InputPoint::kGateUp, layer.mlp.input, activations->norm_shift, layer.mlp.gate_proj, &BlockMoments::gate_up);
    add(InputPoint::kDown, layer.mlp.down_input, activations->shift, layer.mlp.down_proj, &BlockMoments::down);
  }
  if (const auto& cache = recipe.kv_cache) {
    const auto add = [&](QuantPoint& point, const Linear& writer, Moments BlockMoments::*moments) {
      starts.push_back(
          {&point, &*cache, cache->shift, attention.num_kv_heads, writer.weight.size(0), moments, InputPoint::kO});
    };
    add(attention.k_cache, attention.k_proj, &BlockMoments::key);
    add(attention.v_cache, attention.v_proj, &BlockMoments::value);
  }
  return starts;
}

}  // namespace

void start_quant_points(DecoderLayer& layer, const Recipe& recipe, const BlockInputs& inputs, const Tensor& weights,
                        std::initializer_list<InputPoint> only) {
  const c10::NoGradGuard no_grad;
  std::vector<Start> starts = starts_of(layer, recipe);
  if (only.size() > 0) {
    std::erase_if(starts, [&](const Start& start) {
      const bool cache = start.point == &layer.self_attn.k_cache || start.point == &layer.self_attn.v_cache;
      return cache || std::find(only.begin(), only.end(), start.reached_at) == only.end();
    });
  }
  std::optional<InputPoint> last;  // a pass through the block need not go further than the last mean
  for (const Start& start : starts) {
    if (start.shift == Recipe::Shift::kMean) last = std::max(last.value_or(start.reached_at), start.reached_at);
  }
  BlockMoments moments;
  if (last) {
    const bool quantized = recipe.stream == Recipe::Stream::kQuantized;
    moments = measure_block(layer, quantized ? inputs.quantized : inputs.full_precision, inputs.rope, weights,
                            /*with_o_covariance=*/false, *last, inputs.pass);
  }
  const auto options = layer.self_attn.o_proj.weight.options();
  for (const Start& start : starts) {
    QuantPoint& point = *start.point;
    point.enabled = true;
    point.spec = start.activations->spec;
    point.clip = at::full({start.groups, 1}, start.activations->clip, options);
    if (start.shift == Recipe::Shift::kZero) point.shift = at::zeros({start.features}, options);
    if (start.shift == Recipe::Shift::kMean) point.shift = (moments.*start.moments).mean.to(options);
    // Softmax does not see a constant added to every key's logit of a query.
    if (&point == &layer.self_attn.k_cache) point.add_shift_back = false;
  }
}

}  // namespace baseq
