#include "block_quantizer.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../quant/finite.h"
#include "block_walk.h"
#include "block_windows.h"
#include "merge.h"
#include "steps.h"
#include "turns.h"

namespace baseq {
namespace {

/// What is not finite here was not found before the run, whose caller did not look (plan_run does).
void check_finite(const DecoderLayer& layer, int64_t block) {
  const auto check = [&](const std::string& name, const Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || all_finite(tensor), "quantize: ", layer_prefix(block), name,
                " has a value that is not finite");
  };
  layer.for_each_norm([&](const std::string& name, const RmsNorm& norm) { check(name + ".weight", norm.weight); });
  layer.for_each_linear([&](const std::string& name, const Linear& linear) {
    check(name + ".weight", linear.weight);
    check(name + ".bias", linear.bias);
  });
}

/// Steps worth keeping; the others are done again in no time.
bool is_long(const Step& step) {
  return std::holds_alternative<LearnStep>(step) || std::holds_alternative<RoundStep>(step);
}

std::string name_of(const Step& step) {
  const auto* learned = std::get_if<LearnStep>(&step);
  return learned ? learned->name : "rounding";
}

/// What a step is called while it works.
std::string work_of(const Step& step) {
  if (const auto* learned = std::get_if<LearnStep>(&step)) return "learning \"" + learned->name + "\"";
  if (std::holds_alternative<RoundStep>(step)) return "rounding";
  return std::holds_alternative<TransformStep>(step) ? "finding a transform" : "setting quant points";
}

/// Does a part of the work on a block. Where the memory of its device ends, the error says which part.
template <class Work>
auto during(const std::string& what, const BlockPlace& place, const Work& work) {
  try {
    return work();
  } catch (const c10::OutOfMemoryError& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "block ", place.block + 1, " of ", place.config.num_hidden_layers, ", ",
                     what, ": out of memory on ", place.compute.device(),
                     "; with less `device_memory` the activation streams stay on the host, and fewer "
                     "`tokens_per_batch` need less. ",
                     error.what_without_backtrace());
  }
}

/// The grids for a model: a group of the cache is a head.
Grids grids_for(Grids grids, const ModelConfig& config) {
  if (grids.kv_cache) grids.kv_cache->group_size = config.head_dim;
  return grids;
}

}  // namespace

BlockQuantizer::BlockQuantizer(const Model& model, const Recipe& recipe, const Tensor& windows, Options options)
    : model_(model),
      recipe_(recipe),
      options_(std::move(options)),
      windows_(windows.defined() ? options_.pass.shards.own(windows) : windows),
      grids_(grids_for(recipe.grids, model.config())),
      passes_(passes_with_blocks_last(recipe.passes)),
      residual_(residual_transform(recipe, model.config(), options_.compute.device())) {
  options_.pass.matmul_precision = recipe.matmul_precision;
  if (const RoundStep* round = recipe.round_step()) rounding_ = round->gptq;
}

void BlockQuantizer::start(const std::function<Tensor(const Tensor& ids)>& embedding) {
  streams_.pass = options_.pass;
  if (!windows_.defined()) return;
  const ModelConfig& config = model_.config();
  const at::TensorOptions& compute = options_.compute;
  const std::vector<int64_t> shape{windows_.size(0), windows_.size(1), config.hidden_size};
  for (Tensor* stream : {&streams_.full_precision, &streams_.quantized, &target_}) {
    *stream = options_.storage.allocate(shape);
  }
  ahead_ = Tensor();
  ahead_end_ = 0;
  for (int64_t n = 0; n < windows_.size(0); ++n) {
    const Tensor ids = windows_.narrow(0, n, 1);
    const Tensor exact = model_.embed(ids);
    streams_.full_precision.narrow(0, n, 1).copy_(apply_transform(residual_, exact));
    const Tensor written = embedding(ids).to(compute);
    streams_.quantized.narrow(0, n, 1).copy_(written * config.embedding_multiplier);
  }
  streams_.rope = RotaryEmbedding::create(config, windows_.size(1), compute);
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
  DecoderLayer layer = residual_.empty() ? model_.layer(block) : model_.stored_layer(block);
  check_finite(layer, block);
  return layer;
}

/// A block as read_block returns it in the basis of the streams, or another one. Transforms of the residual are merged
/// in float64, and the block stays so unless activations pass it.
DecoderLayer BlockQuantizer::in_basis(DecoderLayer layer, const Transform& residual) const {
  if (!residual_.empty()) {
    layer = std::move(layer).to(at::kDouble);
    fuse_norm_gains(layer);
    transform_residual(layer, residual);
  }
  return windows_.defined() ? std::move(layer).to(options_.compute) : layer;
}

/// The first windows of a stream.
Tensor BlockQuantizer::measured(const Tensor& stream) const {
  const int64_t tokens = std::min(kMeasuredTokens, options_.pass.tokens_per_batch);
  return first_windows(stream, options_.pass.shards, tokens).to(options_.compute);
}

/// @param layer  as read_block returns it
std::map<std::string, ActivationRange> BlockQuantizer::original_ranges(const DecoderLayer& layer) const {
  const Tensor windows = measured(streams_.full_precision);
  // The transform is orthogonal: its transpose takes the stream back to the basis of the checkpoint.
  return activation_ranges(layer, apply_transpose(residual_, windows), streams_.rope);
}

/// Passes the full-precision stream and returns the weights of its tokens.
/// @param ranges of the points of `original`; null: not asked for
Tensor BlockQuantizer::weigh_tokens(const DecoderLayer& original, int64_t block, bool quiet,
                                    std::map<std::string, ActivationRange>* ranges) {
  DecoderLayer observed;
  if (ranges != nullptr) {
    observed = original;
    observe_ranges(observed, *ranges);
  }
  advance(ranges != nullptr ? observed : original, streams_.full_precision, target_, streams_.rope, options_.pass);
  const Shards& shards = options_.pass.shards;
  const Tensor weights = token_weights(target_, recipe_.token_weights, options_.compute, shards);
  const auto ignored = weights.eq(0).sum().item<int64_t>();
  if (ignored > 0 && !quiet) {
    options_.report(
        Warning{fmt::format("block {}: its output is not finite for {} of {} calibration tokens, which do not count in "
                            "this block",
                            block, ignored, weights.numel())});
  }
  return shards.own(weights);
}

int64_t BlockQuantizer::end_of_turn(int64_t pass, int64_t block) const {
  int64_t end = block + 1;
  for (const PlacedStep& placed : steps_at(passes_.at(static_cast<size_t>(pass)), block, num_blocks())) {
    end = std::max(end, placed.end);
  }
  return end;
}

BlockQuantizer::States BlockQuantizer::states_from(const std::map<std::string, Tensor>& tensors, int64_t block,
                                                   int64_t end) const {
  std::map<std::string, Tensor> rest = tensors;
  States states(static_cast<size_t>(end - block));
  for (int64_t distance = end - block - 1; distance >= 0; --distance) {
    states[static_cast<size_t>(distance)] =
        state_from_tensors(distance > 0 ? take_state_tensors(rest, distance) : rest, grids_.in_block(block + distance),
                           options_.compute.device());
  }
  return states;
}

/// The full-precision stream after the blocks up to `end`. Ends of windows do not go back, and so it goes on from the
/// last one.
const Tensor& BlockQuantizer::target_after(std::deque<Ahead>& ahead, int64_t block, int64_t end) {
  if (!ahead_.defined()) ahead_ = options_.storage.allocate(target_.sizes());
  if (ahead_end_ <= block + 1) {
    ahead_.copy_(target_);
    ahead_end_ = block + 1;
  }
  for (; ahead_end_ < end; ++ahead_end_) {
    const DecoderLayer& original = ahead[static_cast<size_t>(ahead_end_ - block - 1)].open.original();
    advance(original, ahead_, ahead_, streams_.rope, options_.pass);
  }
  return ahead_;
}

/// @param task of the first block alone
void BlockQuantizer::learn_window(const LearnStep& step, OpenBlock& first, std::deque<Ahead>& ahead, int64_t end,
                                  const BlockTask& task) {
  if (!step.learns()) return;
  const Tensor& target = target_after(ahead, task.place.block, end);
  const Shards& shards = options_.pass.shards;
  const Tensor weights = shards.own(token_weights(target, recipe_.token_weights, options_.compute, shards));
  const auto in_window = [&](const BlockPlace& place, const Grids& grids) {
    return BlockTask{.place = place,
                     .grids = grids,
                     .rounding = task.rounding,
                     .inputs = task.inputs,
                     .target = target,
                     .token_weights = weights,
                     .seed = task.seed,
                     .report = task.report,
                     .storage = task.storage};
  };
  std::deque<BlockTask> tasks{in_window(task.place, task.grids)};
  std::vector<WindowBlock> window{{first, tasks.back()}};
  for (size_t i = 0; i < static_cast<size_t>(end - task.place.block - 1); ++i) {
    tasks.push_back(in_window(ahead[i].place, ahead[i].grids));
    window.push_back({ahead[i].open, tasks.back()});
  }
  learn_together(step, window);
}

BlockQuantizer::States BlockQuantizer::states_of(const OpenBlock& first, const std::deque<Ahead>& ahead) {
  States states{first.state()};
  for (const Ahead& later : ahead) states.push_back(later.open.state());
  return states;
}

std::deque<BlockQuantizer::Ahead> BlockQuantizer::open_ahead(int64_t block, States& states) {
  std::deque<Ahead> ahead;
  for (size_t i = 1; i < states.size(); ++i) {
    const int64_t later = block + static_cast<int64_t>(i);
    const BlockPlace place{model_.config(), later, options_.compute};
    const auto read = [this, later] { return in_stream_basis(read_block(later)); };
    ahead.push_back({grids_.in_block(later), place, OpenBlock(std::move(states[i]), place, read)});
  }
  return ahead;
}

BlockQuantizer::Result BlockQuantizer::quantize(int64_t pass, int64_t block, States states,
                                                std::optional<StepEnd> reached,
                                                const std::function<void(const StepEnd&)>& step_ended) {
  options_.pass.step();
  const BlockPlace place{model_.config(), block, options_.compute};
  const Grids grids = grids_.in_block(block);
  if (reached) states = states_from(reached->states, block, block + static_cast<int64_t>(states.size()));
  const int64_t begin = reached ? std::exchange(reached, std::nullopt)->num_steps : 0;
  std::map<std::string, ActivationRange> before;
  // Once, when the block is read for the first time; the pass below does it where the basis is the same.
  const bool in_passing = residual_.empty() && options_.pass.tokens_per_batch <= kMeasuredTokens;
  bool measure = windows_.defined() && !in_passing;
  OpenBlock open(std::move(states.front()), place, [&] {
    DecoderLayer layer = read_block(block);
    if (std::exchange(measure, false)) before = original_ranges(layer.to(options_.compute));
    return in_stream_basis(std::move(layer));
  });
  std::deque<Ahead> ahead = open_ahead(block, states);
  const Tensor weights = during("passing the original", place, [&] {
    return windows_.defined() ? weigh_tokens(open.original(), block, begin > 0, in_passing ? &before : nullptr)
                              : Tensor{};
  });
  const BlockTask task{.place = place,
                       .grids = grids,
                       .rounding = rounding_,
                       .inputs = streams_,
                       .target = target_,
                       .token_weights = weights,
                       .seed = options_.seed,
                       .report = options_.report,
                       .storage = options_.storage};
  const std::vector<PlacedStep> steps = steps_at(passes_.at(static_cast<size_t>(pass)), block, num_blocks());
  for (auto placed = steps.begin() + begin; placed != steps.end(); ++placed) {
    const Step& step = *placed->step;
    during(work_of(step), place, [&] {
      if (placed->end == block + 1) return apply_any(step, open, task);
      learn_window(std::get<LearnStep>(step), open, ahead, placed->end, task);
    });
    const bool more = std::any_of(placed + 1, steps.end(), [](const PlacedStep& next) { return is_long(*next.step); });
    if (step_ended && is_long(step) && more) {
      step_ended({placed + 1 - steps.begin(), name_of(step), states_tensors(states_of(open, ahead))});
    }
  }
  states = states_of(open, ahead);
  ahead.clear();
  return during("passing the result", place, [&] {
    return Result{std::move(states), finish(open, block, pass + 1 == num_passes(), before)};
  });
}

/// Ends the work on a block: takes the streams through it.
DecoderLayer BlockQuantizer::finish(OpenBlock& open, int64_t block, bool last_pass,
                                    const std::map<std::string, ActivationRange>& before) {
  OpenBlock::Passed passed = open.take_passed();
  DecoderLayer layer = open.take_layer();
  merge_corrections(layer);
  if (!windows_.defined()) return layer;
  if (last_pass) {
    if (passed.ranges.empty()) {
      passed.ranges = activation_ranges(layer, measured(streams_.quantized), streams_.rope);
    }
    for (const PointMeasured& point : measure_points(block, before, passed.ranges, layer)) options_.report(point);
  }
  if (passed.after_attention.defined()) {
    advance_mlp(layer, passed.after_attention, streams_.quantized, streams_.rope, options_.pass);
  } else {
    advance(layer, streams_.quantized, streams_.quantized, streams_.rope, options_.pass);
  }
  std::swap(streams_.full_precision, target_);
  return layer;
}

void BlockQuantizer::learn_model(int64_t pass, ModelState& state,
                                 const std::function<Heads(at::ScalarType products)>& heads) {
  if (!windows_.defined()) return;  // no step learns
  for (int64_t block = 0; block < static_cast<int64_t>(state.blocks.size()); ++block) pass_full_precision(block);
  for (int64_t n = 0; n < windows_.size(0) && !residual_.empty(); ++n) {
    // The transform is orthogonal: its transpose takes the stream back to the basis of the checkpoint.
    const Tensor window = streams_.full_precision.narrow(0, n, 1);
    window.copy_(apply_transpose(residual_, window.to(options_.compute)));
  }
  const ModelTask task{.config = model_.config(),
                       .grids = grids_,
                       .rounding = rounding_,
                       .inputs = streams_,
                       .target = streams_.full_precision,
                       .windows = windows_,
                       .heads = heads,
                       .read_original = [this](int64_t block) { return in_stream_basis(read_block(block)); },
                       .read_fused = [this](int64_t block) { return in_basis(read_block(block), {}); },
                       .residual =
                           [this](const Tensor& matrix) {
                             if (!matrix.defined()) return residual_;
                             return residual_transform(recipe_, model_.config(), matrix.device(), matrix);
                           },
                       .seed = options_.seed,
                       .report = options_.report};
  for (const Step& step : passes_.at(static_cast<size_t>(pass)).steps) apply(std::get<LearnStep>(step), state, task);
}

double BlockQuantizer::stream_error() const {
  if (!windows_.defined()) return std::numeric_limits<double>::quiet_NaN();
  std::vector<Tensor> errors;
  for_each_batch(streams_.quantized, options_.compute, [&](int64_t begin, const Tensor& windows) {
    const Tensor exact = streams_.full_precision.narrow(0, begin, windows.size(0)).to(options_.compute);
    errors.push_back((windows - exact).square().sum(-1) / exact.square().sum(-1));
  });
  return options_.pass.shards.all(at::cat(errors)).nanmedian().item<double>();
}

}  // namespace baseq
