#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "../tiny_model.h"
#include "pipeline/steps.h"

namespace baseq::test {

inline const std::vector<Site> kInputSites = {Site::kQkv, Site::kO, Site::kGateUp, Site::kDown};
inline const std::vector<Site> kCacheSites = {Site::kQueryKey, Site::kValue};

/// Grids of so many bits for weights, activations and cache.
inline Grids grids_of_bits(int64_t num_bits, const TinyShape& shape) {
  return {.weights = QuantSpec{.num_bits = num_bits},
          .input_activations =
              QuantSpec{.num_bits = num_bits, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true},
          .kv_cache = QuantSpec{.num_bits = num_bits,
                                .symmetric = false,
                                .strategy = Strategy::kGroup,
                                .group_size = shape.head_dim,
                                .dynamic = true}};
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
    point.spec = {.num_bits = num_bits,
                  .symmetric = false,
                  .strategy = info.cache ? Strategy::kGroup : Strategy::kToken,
                  .group_size = info.cache ? features / groups : 0,
                  .dynamic = true};
    point.clip = at::full({groups, 1}, 0.95, at::kDouble);
    point.shift = 0.5 * random_normal({features}, seed++);
    if (!info.cache) point.gain = 1 + 0.2 * random_normal({features}, seed++).tanh();
  }
  return points;
}

/// Tensors of two states, to the last bit.
inline void expect_same_state(const BlockState& got, const BlockState& expected) {
  const auto tensors = state_tensors(got), wanted = state_tensors(expected);
  ASSERT_EQ(tensors.size(), wanted.size());
  for (const auto& [name, tensor] : wanted) {
    ASSERT_TRUE(tensors.contains(name)) << name;
    EXPECT_TRUE(at::equal(tensors.at(name), tensor)) << name;
  }
}

/// Everything of two blocks that a checkpoint stores, to the last bit.
inline void expect_same_layer(const DecoderLayer& got, const DecoderLayer& expected) {
  const auto tensors = layer_tensors(got, "", at::kDouble), wanted = layer_tensors(expected, "", at::kDouble);
  ASSERT_EQ(tensors.size(), wanted.size());
  for (const auto& [name, tensor] : wanted) {
    ASSERT_TRUE(tensors.contains(name)) << name;
    EXPECT_TRUE(at::equal(tensors.at(name), tensor)) << name;
  }
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
    for (const Step& step : steps) std::visit([&](const auto& any) { apply(any, block, given); }, step);
  }
  /// Mean squared error over all windows, which is what a learn step monitors here (kSamples = num_monitored).
  double loss_of(const DecoderLayer& of) const {
    return (of.forward(x, inputs.rope) - target).square().mean().item<double>();
  }
};

inline std::string shape_name(const testing::TestParamInfo<TinyShape>& shape) { return shape.param.name; }

}  // namespace baseq::test
