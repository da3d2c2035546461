#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../tiny_model.h"
#include "pipeline/steps.h"

namespace baseq::test {

inline const std::vector<Site> kInputSites = {Site::kQkv, Site::kO, Site::kGateUp, Site::kDown};
inline const std::vector<Site> kCacheSites = {Site::kQueryKey, Site::kValue};

/// Grids of so many bits for weights, activations and cache.
inline Grids grids_of_bits(int64_t num_bits, const TinyShape& shape) {
  Grids grids{.weights = QuantSpec{}, .input_activations = Grids::kPerToken, .kv_cache = Grids::kPerTokenAndHead};
  for (auto* grid : {&grids.weights, &grids.input_activations, &grids.kv_cache}) (*grid)->num_bits = num_bits;
  grids.kv_cache->group_size = shape.head_dim;
  return grids;
}

/// A Hadamard factor at each site; at value one per head, at query_key one for all heads.
inline BlockState with_hadamards(const ModelConfig& config, const std::vector<Site>& at) {
  BlockState state;
  for (const Site site : at) {
    const auto [blocks, features] = site_shape(site, config);
    state.transforms[site] = {hadamard_factor(features / blocks, site == Site::kQueryKey ? 1 : blocks)};
  }
  return state;
}

/// Every quant point on, with corrections that are not at their start, float64.
inline std::map<Site, QuantPoint> corrected_points(const ModelConfig& config, int64_t num_bits) {
  std::map<Site, QuantPoint> points;
  uint64_t seed = 300;
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const auto [groups, features] = site_shape(info.site, config);
    QuantPoint& point = points[info.site];
    point.enabled = true;
    point.spec = info.cache ? Grids::kPerTokenAndHead : Grids::kPerToken;
    point.spec.num_bits = num_bits;
    if (info.cache) point.spec.group_size = features / groups;
    point.clip = at::full({groups, 1}, 0.95, at::kDouble);
    point.shift = 0.5 * random_normal({features}, seed++);
    if (!info.cache) point.gain = 1 + 0.2 * random_normal({features}, seed++).tanh();
  }
  return points;
}

/// BASE-Q's stage of transforms, in float32.
inline LearnStep learn_transforms(int64_t epochs) {
  return {.name = "transforms",
          .weights = LearnStep::Weights::kStraightThrough,
          .epochs = epochs,
          .rates = {{"value.matrix", 3e-3},
                    {"value.scale", 3e-3},
                    {"o.scale", 3e-3},
                    {"down.scale", 3e-3},
                    {"*.clip", 3e-2},
                    {"*.shift", 2e-3}},
          .final_rate = 3e-5,
          .products = at::kFloat};
}

/// BASE-Q's stage of activations, in float32.
inline LearnStep learn_activations(int64_t epochs) {
  return {.name = "activations",
          .epochs = epochs,
          .rates = {{"*.clip", 3e-2}, {"*.shift", 2e-3}, {"*.gain", 3e-3}},
          .final_rate = 3e-6,
          .products = at::kFloat};
}

/// The same names and tensors, to the last bit.
inline void expect_same_tensors(const std::map<std::string, Tensor>& got,
                                const std::map<std::string, Tensor>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(got.contains(name)) << name;
    EXPECT_TRUE(at::equal(got.at(name), tensor)) << name;
  }
}

inline void expect_same_state(const BlockState& got, const BlockState& expected) {
  expect_same_tensors(state_tensors(got), state_tensors(expected));
}

/// Everything of two blocks that a checkpoint stores.
inline void expect_same_layer(const DecoderLayer& got, const DecoderLayer& expected) {
  expect_same_tensors(layer_tensors(got, "", at::kDouble), layer_tensors(expected, "", at::kDouble));
}

/// A block of a tiny model, four windows of inputs, its output on them as the target, and what a step is given.
class BlockTest : public testing::TestWithParam<TinyShape> {
 protected:
  static constexpr int64_t kSeq = 16, kSamples = 4;

  explicit BlockTest(at::ScalarType type = at::kFloat) : dtype(type) {}

  at::ScalarType dtype;
  TinyShape shape = GetParam();
  ModelConfig config = tiny_model_config(shape);
  BlockPlace place{config, 0, dtype};
  Grids grids;
  GptqOptions rounding;
  DecoderLayer layer = tiny_layer(shape, 1, dtype);
  Tensor x =
      random_normal({kSamples, kSeq, shape.hidden_size}, 7, dtype) + random_normal({shape.hidden_size}, 8, dtype);
  BlockInputs inputs{.full_precision = x, .quantized = x, .rope = tiny_rope(shape, kSeq, dtype)};
  Tensor target = layer.forward(x, inputs.rope);
  Tensor weights = token_weights(target, Recipe::TokenWeights::kUniform, dtype);
  std::vector<StageLearned> stages;
  std::vector<std::string> warnings;
  ProgressFn report = [this](const ProgressEvent& event) {
    if (const auto* stage = std::get_if<StageLearned>(&event)) stages.push_back(*stage);
    if (const auto* warning = std::get_if<Warning>(&event)) warnings.push_back(warning->message);
  };

  OpenBlock open_block(BlockState state = {}) const {
    return OpenBlock(std::move(state), place, [original = layer] { return original; });
  }
  BlockTask task() const {
    return {.place = place,
            .grids = grids,
            .rounding = rounding,
            .inputs = inputs,
            .target = target,
            .token_weights = weights,
            .seed = 3,
            .report = report};
  }
  void run(OpenBlock& block, const std::vector<Step>& steps) const {
    const BlockTask given = task();
    for (const Step& step : steps) apply_any(step, block, given);
  }
  /// Mean squared error over all windows, which is what a learn step monitors here (kSamples = num_monitored).
  double loss_of(const DecoderLayer& of) const {
    return (of.forward(x, inputs.rope) - target).square().mean().item<double>();
  }
};

}  // namespace baseq::test
