#include "block_quantizer.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../quant/finite.h"
#include "baseq/pipeline/balance.h"
#include "baseq/pipeline/layer_state.h"
#include "baseq/pipeline/learn.h"
#include "baseq/pipeline/merge.h"
#include "baseq/pipeline/round_layer.h"
#include "baseq/pipeline/start_points.h"
#include "baseq/pipeline/statistics.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

/// Calibration tokens that the ranges in the log are of.
constexpr int64_t kMeasuredTokens = 2048;

/// What is not finite here was not found before the run, whose caller did not look (plan_run does).
void check_finite(const DecoderLayer& layer, int64_t block) {
  const auto check = [&](const std::string& name, const Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || all_finite(tensor), "quantize: ", layer_prefix(block), name,
                " has a value that is not finite");
  };
  check("input_layernorm.weight", layer.input_layernorm.weight);
  check("post_attention_layernorm.weight", layer.post_attention_layernorm.weight);
  check("self_attn.q_norm.weight", layer.self_attn.q_norm.weight);
  check("self_attn.k_norm.weight", layer.self_attn.k_norm.weight);
  layer.for_each_linear([&](const std::string& name, const Linear& linear) {
    check(name + ".weight", linear.weight);
    check(name + ".bias", linear.bias);
  });
}

bool has_block_hadamards(const Recipe::Transforms& transforms) {
  return transforms.input || transforms.value || transforms.query_key || transforms.o || transforms.down;
}

}  // namespace

BlockQuantizer::BlockQuantizer(const Model& model, const Recipe& recipe, const Tensor& windows, Options options)
    : model_(model), recipe_(recipe), windows_(windows), options_(std::move(options)) {}

void BlockQuantizer::start(const Tensor& embedding) {
  if (!windows_.defined()) return;
  const ModelConfig& config = model_.config();
  const at::TensorOptions& compute = options_.compute;
  const std::vector<int64_t> shape{windows_.size(0), windows_.size(1), config.hidden_size};
  for (Tensor* stream : {&streams_.full_precision, &streams_.quantized, &target_}) {
    *stream = options_.storage.allocate(shape);
  }
  for (int64_t n = 0; n < windows_.size(0); ++n) {
    const Tensor ids = windows_.narrow(0, n, 1);
    const Tensor exact = model_.embed(ids);
    streams_.full_precision.narrow(0, n, 1).copy_(recipe_.transforms.residual ? hadamard_transform(exact) : exact);
    const Tensor written = at::embedding(embedding, ids.to(compute.device())).to(compute);
    streams_.quantized.narrow(0, n, 1).copy_(written * config.embedding_multiplier);
  }
  streams_.rope = RotaryEmbedding::create(config, windows_.size(1), compute);
  streams_.pass = options_.pass;
}

std::map<std::string, Tensor*> BlockQuantizer::streams() {
  if (!windows_.defined()) return {};
  return {{kFullPrecision, &streams_.full_precision}, {kQuantized, &streams_.quantized}};
}

void BlockQuantizer::pass_full_precision(int64_t block) {
  const DecoderLayer layer = in_stream_basis(read_block(block)).to(options_.compute);
  advance(layer, streams_.full_precision, streams_.full_precision, streams_.rope, options_.pass);
}

/// The block as the checkpoint has it. What will be rotated, in float64, comes in the type in which it is stored, but
/// at least in float32: it is measured before it is widened, without a copy.
DecoderLayer BlockQuantizer::read_block(int64_t block) const {
  DecoderLayer layer = recipe_.transforms.residual ? model_.stored_layer(block) : model_.layer(block);
  check_finite(layer, block);
  return layer;
}

/// A block as read_block returns it in the basis of the streams, transforms of the residual merged in float64.
DecoderLayer BlockQuantizer::in_stream_basis(DecoderLayer layer) const {
  if (!recipe_.transforms.residual) return layer;
  layer = std::move(layer).to(at::kDouble);
  fuse_norm_gains(layer);
  rotate_residual(layer);
  return layer;
}

/// The first windows of a stream.
Tensor BlockQuantizer::measured(const Tensor& stream) const {
  const int64_t tokens = std::min(kMeasuredTokens, options_.pass.tokens_per_batch);
  return stream.narrow(0, 0, std::clamp<int64_t>(tokens / stream.size(1), 1, stream.size(0))).to(options_.compute);
}

/// @param layer  as read_block returns it
std::map<std::string, ActivationRange> BlockQuantizer::original_ranges(const DecoderLayer& layer) const {
  const Tensor windows = measured(streams_.full_precision);
  return activation_ranges(
      layer, recipe_.transforms.residual ? hadamard_transform(windows, /*transpose=*/true) : windows, streams_.rope);
}

void BlockQuantizer::transform(DecoderLayer& layer, const LearningTask& task) const {
  if (windows_.defined()) {
    for (const std::string& name : balance(layer, recipe_.transforms, streams_, task.token_weights)) {
      options_.report(Warning{fmt::format(
          "block {}: {} is left out: what the calibration windows show there is not finite", task.block, name)});
    }
  }
  if (recipe_.learn_transforms.epochs > 0) {
    learn_transforms(layer, task);
    return;
  }
  if (has_block_hadamards(recipe_.transforms)) {
    layer = std::move(layer).to(at::kDouble);
    apply_hadamards(layer, recipe_.transforms);
  }
  layer = std::move(layer).to(options_.compute);
  start_quant_points(layer, recipe_, streams_, task.token_weights);
}

void BlockQuantizer::round(DecoderLayer& layer, const LearningTask& task) const {
  if (!recipe_.weights) return;
  std::map<std::string, Tensor> unrounded;
  const bool learned = recipe_.low_rank && recipe_.low_rank->block_epochs > 0;
  if (learned) {
    layer.for_each_linear([&](const std::string& name, const Linear& linear) { unrounded[name] = linear.weight; });
  }
  round_layer(layer, recipe_, streams_, task.token_weights, task.block, options_.report);
  if (learned) learn_low_rank(layer, unrounded, task);
}

DecoderLayer BlockQuantizer::quantize(int64_t block, std::optional<StageEnd> reached,
                                      const std::function<void(const StageEnd&)>& stage_ended) {
  options_.pass.step();
  DecoderLayer layer = read_block(block);
  std::map<std::string, ActivationRange> before;
  if (windows_.defined()) before = original_ranges(layer.to(options_.compute));
  layer = in_stream_basis(std::move(layer));
  Tensor weights;
  if (windows_.defined()) {
    layer = std::move(layer).to(options_.compute);
    advance(layer, streams_.full_precision, target_, streams_.rope, options_.pass);
    weights = token_weights(target_, recipe_.loss, options_.compute);
    if (const auto ignored = weights.eq(0).sum().item<int64_t>(); ignored > 0 && !reached) {
      options_.report(
          Warning{fmt::format("block {}: its output is not finite for {} of {} calibration tokens, which do not "
                              "count in this block",
                              block, ignored, weights.numel())});
    }
  }
  const LearningTask task{.recipe = recipe_,
                          .inputs = streams_,
                          .target = target_,
                          .token_weights = weights,
                          .seed = options_.seed,
                          .block = block,
                          .progress = options_.report};
  if (reached) {
    layer = {};
    layer = restore_layer(DecoderLayer::create(model_.config(), block), reached->layer, recipe_, options_.compute);
    reached->layer.clear();
  }
  bool ahead = !reached;  // whether what comes next is still to be done
  // work() returns whether what it made is worth keeping.
  const auto stage = [&](const std::string& name, const auto& work) {
    if (!ahead) {
      ahead = name == reached->stage;
    } else if (work() && stage_ended) {
      // As a restored layer is: how data lie can decide about the last bits of a product.
      layer.for_each_linear([](const std::string&, Linear& linear) { linear.weight = linear.weight.contiguous(); });
      stage_ended({name, layer_state(layer)});
    }
  };
  const bool learns_activations = recipe_.learn_activations.epochs > 0;
  stage("transforms", [&] {
    transform(layer, task);
    return recipe_.learn_transforms.epochs > 0;
  });
  stage("rounding", [&] {
    round(layer, task);
    return recipe_.weights && learns_activations;
  });
  TORCH_CHECK(ahead, "quantize: block ", block, " was left after a stage \"", reached->stage, "\", which is not known");
  if (learns_activations) learn_activations(layer, task);
  merge_corrections(layer);
  if (windows_.defined()) {
    for (const PointMeasured& point :
         measure_points(block, before, layer, measured(streams_.quantized), streams_.rope)) {
      options_.report(point);
    }
    advance(layer, streams_.quantized, streams_.quantized, streams_.rope, options_.pass);
    std::swap(streams_.full_precision, target_);
  }
  return layer;
}

double BlockQuantizer::stream_error() const {
  if (!windows_.defined()) return std::numeric_limits<double>::quiet_NaN();
  std::vector<Tensor> errors;
  for_each_batch(streams_.quantized, options_.compute, [&](int64_t begin, const Tensor& windows) {
    const Tensor exact = streams_.full_precision.narrow(0, begin, windows.size(0)).to(options_.compute);
    errors.push_back((windows - exact).square().sum(-1) / exact.square().sum(-1));
  });
  return at::cat(errors).nanmedian().item<double>();
}

}  // namespace baseq
