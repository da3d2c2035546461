#include "pipeline/block_state.h"

#include <gtest/gtest.h>

#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Kind = Factor::Kind;

class StoredState : public test::BlockTest {
 protected:
  StoredState() { grids = test::grids_of_bits(4, shape); }

  void expect_kept(OpenBlock& block, const char* when) const {
    SCOPED_TRACE(when);
    const BlockState restored = state_from_tensors(state_tensors(block.state()), grids, at::kCPU);
    const DecoderLayer again = realize(layer, restored, place);
    EXPECT_TRUE(at::equal(again.forward(x, inputs.rope), block.layer().forward(x, inputs.rope)));
    test::expect_same_layer(again, block.layer());
    test::expect_same_state(restored, block.state());
  }
};

TEST_P(StoredState, GivesTheSameBlockBack) {
  OpenBlock block = open_block();
  expect_kept(block, "as the checkpoint has it");
  block.edit([&](BlockState& state) {
    uint64_t seed = 1;
    const auto add = [&](Site site, std::initializer_list<Kind> kinds) {
      for (const Kind kind : kinds) {
        state.transforms[site].push_back(test::random_factor(kind, site, config, seed++).to(at::kFloat));
      }
    };
    add(Site::kQkv, {Kind::kScale, Kind::kKronecker});
    add(Site::kQueryKey, {Kind::kScale, Kind::kMatrix, Kind::kHadamard});
    add(Site::kValue, {Kind::kScale, Kind::kMatrix, Kind::kHadamard});
    add(Site::kO, {Kind::kHadamard, Kind::kScale});
    add(Site::kGateUp, {Kind::kHadamard});
    add(Site::kDown, {Kind::kScale, Kind::kPermutation, Kind::kHadamard});
  });
  block.edit([&](BlockState& state) {
    const Tensor heads = test::invertible({shape.num_heads, shape.num_heads}, 3).to(at::kFloat);
    state.transforms[Site::kO].push_back(left_kronecker_factor(heads, shape.head_dim));
  });
  expect_kept(block, "with transforms");
  run(block, {PointsStep{.at = test::kInputSites, .clip = 0.9, .shift = PointsStep::Shift::kMean},
              PointsStep{.at = test::kCacheSites, .shift = PointsStep::Shift::kZero}});
  block.edit_points([&](BlockState& state) {
    state.points.at(Site::kDown).gain = test::random_normal({shape.intermediate_size}, 5, at::kFloat).exp();
  });
  expect_kept(block, "with quant points");
  block.edit_points([&](BlockState& state) { state.points.at(Site::kO).runtime = RuntimeSmooth{.group = 4}; });
  expect_kept(block, "with Runtime Smooth");
  run(block, {RoundStep{.method = RoundStep::Method::kGptq}});
  expect_kept(block, "rounded");
  RoundStep corrected{.low_rank = LowRankOptions{.method = LowRankOptions::Method::kSvd, .rank = 3}};
  for (const at::ScalarType factors : {at::kChar, at::kBFloat16}) {
    corrected.low_rank->dtype = factors;
    run(block, {corrected});
    expect_kept(block, at::toString(factors));
  }
  block.edit([&](BlockState& state) {
    state.weights.at("mlp.up_proj") = {.clip = at::full({shape.intermediate_size, 1, 1}, 0.7)};
    state.weights.erase("self_attn.o_proj");
  });
  expect_kept(block, "with codes for some linears and a learned clip for one");
}

TEST_P(StoredState, OfAnAsymmetricGridInGroups) {
  grids.weights = QuantSpec{.num_bits = 3, .symmetric = false, .strategy = Strategy::kGroup, .group_size = 4};
  OpenBlock block = open_block();
  run(block, {RoundStep{}});
  expect_kept(block, "rounded");
}

TEST_P(StoredState, WhatIsMissingIsNamed) {
  OpenBlock block = open_block();
  run(block, {PointsStep{.at = {Site::kO, Site::kValue}}, RoundStep{}});
  auto tensors = state_tensors(block.state());
  const auto restore = [&] { state_from_tensors(tensors, grids, at::kCPU); };
  restore();
  for (const char* kind : {"weight", "input", "cache"}) {
    const Grids whole = grids;
    if (kind == std::string("weight")) grids.weights.reset();
    if (kind == std::string("input")) grids.input_activations.reset();
    if (kind == std::string("cache")) grids.kv_cache.reset();
    test::expect_error(restore, {"state of a block", "grid"});
    grids = whole;
  }
  tensors.erase("mlp.up_proj.weight_scale");
  test::expect_error(restore, {"mlp.up_proj.weight_scale", "missing"});
}

TEST_P(StoredState, IsACopy) {
  OpenBlock block = open_block();
  run(block, {PointsStep{.at = {Site::kO}, .clip = 0.5}});
  auto tensors = state_tensors(block.state());
  const BlockState restored = state_from_tensors(tensors, grids, at::kCPU);
  for (auto& [name, tensor] : tensors) tensor.zero_();
  EXPECT_TRUE(at::equal(restored.points.at(Site::kO).clip, at::full({1, 1}, 0.5)));
}

INSTANTIATE_TEST_SUITE_P(Shapes, StoredState, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(FindFactor, GivesTheLastOfItsKind) {
  const Factor first = scale_factor(at::ones({8})), second = scale_factor(at::full({8}, 2.0));
  BlockState state{.transforms = {{Site::kO, {first, hadamard_factor(8), second, hadamard_factor(4, 2)}}}};
  Transform& transform = state.transforms.at(Site::kO);
  EXPECT_EQ(find_factor(state, Site::kO, Kind::kScale), &transform[2]);
  EXPECT_EQ(find_factor(state, Site::kO, Kind::kHadamard), &transform[3]);
  EXPECT_EQ(find_factor(state, Site::kO, Kind::kMatrix), nullptr);
  EXPECT_EQ(find_factor(state, Site::kDown, Kind::kScale), nullptr);
}

}  // namespace
}  // namespace baseq
