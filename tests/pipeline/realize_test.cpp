#include "pipeline/realize.h"

#include <gtest/gtest.h>

#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Kind = Factor::Kind;
using test::TinyShape;

constexpr double kRealizeTolerance = 1e-10;
constexpr Kind kKinds[] = {Kind::kScale, Kind::kHadamard, Kind::kMatrix, Kind::kKronecker, Kind::kPermutation};

class Realize : public test::BlockTest {
 protected:
  Realize() : BlockTest(at::kDouble) {}

  bool is_merged(Site site, const Factor& factor) const {
    // At query_key every other factor has the size of one head.
    if (site == Site::kQueryKey && factor.kind != Kind::kScale) return false;
    return absorbed(site, factor, config, 0);
  }
  Transform random_chain(Site site, const std::vector<Kind>& kinds, uint64_t seed) const {
    Transform chain;
    bool online = false;
    for (const Kind kind : kinds) {
      chain.push_back(test::random_factor(kind, site, config, seed++, online));
      online = online || !is_merged(site, chain.back());
    }
    return chain;
  }
  /// A Kronecker factor over the heads mixes them, where there is more than one.
  bool fits(Site site, Kind kind) const {
    return site != Site::kValue || kind != Kind::kKronecker || shape.num_kv_heads == 1;
  }
  bool has_other_weights(const DecoderLayer& realized) const {
    const Tensor &before = layer.self_attn.k_norm.weight, &after = realized.self_attn.k_norm.weight;
    bool changed = before.defined() && !at::equal(before, after);
    realized.for_each_linear([&](const std::string& name, const Linear& linear) {
      changed = changed || !at::equal(linear.weight, layer.linear(name).weight);
    });
    return changed;
  }
  /// The block that `state` and the layer are, whose output must be that of the layer.
  DecoderLayer expect_kept(const BlockState& state) const {
    DecoderLayer realized = realize(layer, state, place);
    EXPECT_LT(test::relative_error(realized.forward(x, inputs.rope), target), kRealizeTolerance);
    realized.for_each_linear([&](const std::string& name, const Linear& linear) {
      EXPECT_EQ(linear.weight.sizes(), layer.linear(name).weight.sizes()) << name;
      EXPECT_TRUE(linear.weight.is_contiguous()) << name;
      EXPECT_EQ(linear.bias.defined(), layer.linear(name).bias.defined()) << name;
    });
    return realized;
  }
};

TEST_P(Realize, AnEmptyStateIsTheOriginalToTheLastBit) {
  EXPECT_TRUE(at::equal(realize(layer, {}, place).forward(x, inputs.rope), target));
}

TEST_P(Realize, EveryFactorAtEverySiteKeepsTheOutput) {
  for (const SiteInfo& info : sites()) {
    if (info.site == Site::kResidual) continue;
    for (const Kind kind : kKinds) {
      if (!fits(info.site, kind)) continue;
      SCOPED_TRACE(std::string(info.name) + ", kind " + std::to_string(int(kind)));
      const Factor factor = test::random_factor(kind, info.site, config, 40);
      const DecoderLayer realized = expect_kept({.transforms = {{info.site, {factor}}}});
      const bool merged = is_merged(info.site, factor), gain = info.site == Site::kO && kind == Kind::kScale;
      // q and k take an online transform alike.
      EXPECT_EQ(has_other_weights(realized), merged || info.site != Site::kQueryKey);
      EXPECT_EQ(realized.point(info.site).gain.defined(), gain);
      if (!info.online) continue;
      EXPECT_EQ(realized.transform(info.site).size(), merged || gain ? 0U : 1U);
    }
  }
}

TEST_P(Realize, TheLongestPrefixIsMergedAndAScaleAtTheEndIsAGain) {
  struct Case {
    Site site;
    std::vector<Kind> kinds;
    size_t online;
    bool gain = false;
  };
  const std::vector<Case> cases = {
      {Site::kValue, {Kind::kScale, Kind::kMatrix, Kind::kHadamard}, 0},
      {Site::kValue, {Kind::kPermutation, Kind::kHadamard, Kind::kScale, Kind::kMatrix}, 0},
      {Site::kDown, {Kind::kScale, Kind::kHadamard}, 1},
      {Site::kDown, {Kind::kScale, Kind::kPermutation, Kind::kHadamard}, 1},
      {Site::kDown, {Kind::kPermutation, Kind::kScale}, 0},
      {Site::kDown, {Kind::kPermutation, Kind::kScale, Kind::kPermutation, Kind::kMatrix, Kind::kHadamard}, 2},
      {Site::kDown, {Kind::kHadamard, Kind::kPermutation, Kind::kScale}, 2, true},
      {Site::kO, {Kind::kScale}, 0, true},
      {Site::kO, {Kind::kHadamard, Kind::kScale}, 1, true},
      {Site::kO, {Kind::kScale, Kind::kHadamard}, 2},
      {Site::kO, {Kind::kScale, Kind::kScale}, 1, true},
      {Site::kQkv, {Kind::kScale, Kind::kHadamard}, 1},
      {Site::kQkv, {Kind::kHadamard, Kind::kScale}, 1, true},
      {Site::kGateUp, {Kind::kScale, Kind::kScale}, 0},
      {Site::kGateUp, {Kind::kScale, Kind::kKronecker, Kind::kScale}, 1, true},
      {Site::kQueryKey, {Kind::kScale, Kind::kHadamard}, 1},
      {Site::kQueryKey, {Kind::kScale, Kind::kScale, Kind::kMatrix, Kind::kPermutation}, 2},
      {Site::kQueryKey, {Kind::kHadamard, Kind::kScale}, 2},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    const Case& each = cases[i];
    const BlockState state{.transforms = {{each.site, random_chain(each.site, each.kinds, 10 * i)}}};
    const DecoderLayer realized = expect_kept(state);
    EXPECT_EQ(realized.point(each.site).gain.defined(), each.gain);
    if (each.site == Site::kValue) continue;
    EXPECT_EQ(realized.transform(each.site).size(), each.online);
  }
}

TEST_P(Realize, RandomChainsAtAllSitesKeepTheOutput) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    const Tensor draws = test::random_ids({int64_t(sites().size()), 3}, 5, seed);
    BlockState state;
    for (const SiteInfo& info : sites()) {
      if (info.site == Site::kResidual) continue;
      std::vector<Kind> kinds;
      for (int64_t i = 0; i < 3; ++i) {
        const Kind kind = kKinds[draws[int64_t(info.site)][i].item<int64_t>()];
        if (fits(info.site, kind)) kinds.push_back(kind);
      }
      state.transforms[info.site] = random_chain(info.site, kinds, 100 * seed + 10 * uint64_t(info.site));
    }
    expect_kept(state);
  }
}

TEST_P(Realize, AMatrixAtValueChangesWhatTheCacheHolds) {
  const Factor factor = test::random_factor(Kind::kMatrix, Site::kValue, config, 3);
  const auto values = [&](const DecoderLayer& of) {
    return of.self_attn.v_proj.forward(x).view({kSamples, kSeq, shape.num_kv_heads, shape.head_dim});
  };
  const DecoderLayer realized = realize(layer, {.transforms = {{Site::kValue, {factor}}}}, place);
  const Tensor expected = at::einsum("bskd,kde->bske", {values(layer), factor.left});
  EXPECT_LT(test::relative_error(values(realized), expected), kRealizeTolerance);
}

TEST_P(Realize, AScaleAtOMultipliesTheGainOfItsPoint) {
  const Factor scale = test::random_factor(Kind::kScale, Site::kO, config, 3);
  BlockState state{.transforms = {{Site::kO, {scale}}}, .points = test::corrected_points(config, 8)};
  const Tensor gain = state.points.at(Site::kO).gain;
  EXPECT_TRUE(at::equal(realize(layer, state, place).self_attn.o_input.gain, scale.left * gain));
  state.points.at(Site::kO).gain = Tensor{};
  EXPECT_TRUE(at::equal(realize(layer, state, place).self_attn.o_input.gain, scale.left));
}

TEST_P(Realize, HadamardFactorsAreMergedInFloat64) {
  const std::vector<Site> everywhere = {Site::kQkv, Site::kQueryKey, Site::kValue,
                                        Site::kO,   Site::kGateUp,   Site::kDown};
  const BlockState state = test::with_hadamards(config, everywhere);
  const DecoderLayer single = layer.to(at::kFloat);
  const BlockPlace wide{config, 0, at::kDouble}, narrow{config, 0, at::kFloat};
  test::expect_same_layer(realize(single, state, narrow), realize(single.to(at::kDouble), state, wide).to(at::kFloat));
}

TEST_P(Realize, PartsAreThoseOfTheWhole) {
  BlockState state = test::with_hadamards(config, {Site::kQueryKey, Site::kO, Site::kDown});
  state.transforms[Site::kQkv] = random_chain(Site::kQkv, {Kind::kScale}, 1);
  state.transforms[Site::kValue] = random_chain(Site::kValue, {Kind::kMatrix, Kind::kHadamard}, 2);
  state.points = test::corrected_points(config, 4);
  const DecoderLayer whole = realize(layer, state, place);
  DecoderLayer parts = layer;
  const SplitTransforms transforms = split_transforms(state, place);
  realize_sites(parts, layer, transforms, state, place);
  parts.for_each_linear([&](const std::string& name, Linear& linear) {
    linear = realize_linear(layer, name, transforms, place, at::kDouble);
  });
  test::expect_same_layer(parts, whole);
  EXPECT_TRUE(at::equal(parts.forward(x, inputs.rope), whole.forward(x, inputs.rope)));
  state.points.at(Site::kO).clip = at::full({1, 1}, 0.5, at::kDouble);
  realize_points(parts, transforms, state, place);
  test::expect_same_layer(parts, realize(layer, state, place));
}

TEST_P(Realize, ScalesAtDownStandInUpAlone) {
  const Factor scale = test::random_factor(Kind::kScale, Site::kDown, config, 1);
  const Factor permutation = test::random_factor(Kind::kPermutation, Site::kDown, config, 2);
  const BlockState state{.transforms = {{Site::kDown, {scale, permutation}}}};
  EXPECT_TRUE(at::equal(merged_scale(Site::kDown, split_transforms(state, place), place),
                        scale.left.index_select(0, permutation.left)));
  const DecoderLayer realized = realize(layer, state, place);
  EXPECT_TRUE(at::equal(realized.mlp.gate_proj.weight, layer.mlp.gate_proj.weight.index_select(0, permutation.left)));
}

TEST_P(Realize, RefusesWhatTheWeightsAroundASiteCannotTake) {
  const auto expect_refused = [&](Site site, const Factor& factor, const std::vector<std::string>& parts) {
    test::expect_error([&] { realize(layer, {.transforms = {{site, {factor}}}}, place); }, parts);
  };
  const int64_t features = shape.num_kv_heads * shape.head_dim;
  expect_refused(Site::kValue,
                 matrix_factor(test::invertible({shape.num_kv_heads + 1, shape.head_dim, shape.head_dim}, 1)),
                 {"value", std::to_string(features), std::to_string(features + shape.head_dim)});
  if (shape.num_kv_heads == 1) return;
  const auto mixed = kronecker_factor(test::invertible({2, 2}, 1), test::invertible({features / 2, features / 2}, 2));
  expect_refused(Site::kValue, mixed, {"value", "block 0"});
  // Different within the pairs that RoPE turns, or over heads with one norm.
  if (!config.blocks[0].rope && !config.qk_norm) return;
  expect_refused(Site::kQueryKey, scale_factor(test::random_normal({features}, 3).exp()), {"query_key", "block 0"});
}

INSTANTIATE_TEST_SUITE_P(Shapes, Realize, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
