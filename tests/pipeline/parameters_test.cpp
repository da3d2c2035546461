#include "pipeline/parameters.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "block_test.h"
#include "random_factors.h"

namespace baseq {
namespace {

using Rates = std::map<std::string, double>;

class LearnedParameters : public test::BlockTest {
 protected:
  LearnedParameters() { grids = test::grids_of_bits(4, shape); }

  std::vector<Parameter> make(const BlockState& state, const Rates& rates) const {
    return make_parameters({.name = "some step", .rates = rates}, state, place, grids);
  }
  static std::map<std::string, double> rates_by_name(const std::vector<Parameter>& parameters) {
    std::map<std::string, double> rates;
    for (const Parameter& parameter : parameters) rates[parameter.name] = parameter.rate;
    return rates;
  }
  /// Every transform and point that can be learned, rounded next to corrections of low rank.
  BlockState rich_state() const {
    OpenBlock block = open_block();
    block.edit([&](BlockState& state) {
      const auto add = [&](Site site, Factor::Kind kind) {
        state.transforms[site].push_back(test::random_factor(kind, site, config, 9).to(at::kFloat));
      };
      for (const Site site : {Site::kQkv, Site::kValue, Site::kO, Site::kGateUp, Site::kDown}) {
        add(site, Factor::Kind::kScale);
      }
      add(Site::kValue, Factor::Kind::kMatrix);
    });
    LowRankOptions low_rank{.method = LowRankOptions::Method::kSvd, .rank = 2, .dtype = at::kFloat};
    run(block, {PointsStep{.at = test::kInputSites, .clip = 0.9, .shift = PointsStep::Shift::kMean},
                PointsStep{.at = test::kCacheSites, .clip = 0.95}, RoundStep{.low_rank = low_rank}});
    return block.state();
  }
};

TEST_P(LearnedParameters, AreThoseThatTheRatesName) {
  const BlockState state = rich_state();
  EXPECT_TRUE(make(state, {}).empty());
  EXPECT_EQ(rates_by_name(make(state, {{"*.clip", 0.5}})), (Rates{{"qkv.clip", 0.5},
                                                                  {"o.clip", 0.5},
                                                                  {"gate_up.clip", 0.5},
                                                                  {"down.clip", 0.5},
                                                                  {"k_cache.clip", 0.5},
                                                                  {"v_cache.clip", 0.5}}));
  EXPECT_EQ(rates_by_name(make(state, {{"*.shift", 0.5}, {"value.matrix", 0.25}, {"*.scale", 0.125}})),
            (Rates{{"qkv.shift", 0.5},
                   {"o.shift", 0.5},
                   {"gate_up.shift", 0.5},
                   {"down.shift", 0.5},
                   {"qkv.scale", 0.125},
                   {"value.scale", 0.125},
                   {"o.scale", 0.125},
                   {"gate_up.scale", 0.125},
                   {"down.scale", 0.125},
                   {"value.matrix", 0.25}}));
  EXPECT_EQ(make(state, {{"*.weight_clip", 0.5}}).size(), 7U);
  EXPECT_EQ(make(state, {{"*.low_rank", 0.5}}).size(), 7U);
}

TEST_P(LearnedParameters, AnExactNameCountsBeforeAStar) {
  EXPECT_EQ(rates_by_name(make(rich_state(), {{"*.gain", 0.5}, {"o.gain", 0.25}})),
            (Rates{{"qkv.gain", 0.5}, {"o.gain", 0.25}, {"gate_up.gain", 0.5}, {"down.gain", 0.5}}));
}

TEST_P(LearnedParameters, AKeyThatNamesNothingIsAnError) {
  const BlockState state = rich_state();
  for (const char* key : {"down.matrix", "*.offset", "k_cache.gain", "v_cache.shift", "query_key.clip", "value.clip",
                          "mlp.up_proj.clip", "clip", "*.*", "", "o"}) {
    test::expect_error([&] { make(state, {{"*.clip", 1}, {key, 1}}); }, {"some step", "\"" + std::string(key) + "\""});
  }
  test::expect_error([&] { make({}, {{"*.clip", 1}}); }, {"some step", "*.clip"});
  test::expect_error([&] { make({}, {{"*.low_rank", 1}}); }, {"some step", "*.low_rank"});
  grids.weights.reset();
  test::expect_error([&] { make({}, {{"*.weight_clip", 1}}); }, {"some step", "*.weight_clip"});
}

TEST_P(LearnedParameters, BeginAtTheValuesOfTheState) {
  const Rates all = {{"*.scale", 1}, {"value.matrix", 1}, {"*.clip", 1},
                     {"*.shift", 1}, {"*.gain", 1},       {"*.low_rank", 1}};
  const BlockState state = rich_state();
  BlockState written = state;
  for (const Parameter& parameter : make(state, all)) {
    for (const Tensor& leaf : parameter.leaves) {
      EXPECT_TRUE(leaf.is_leaf() && leaf.requires_grad()) << parameter.name;
    }
    parameter.write(written);
  }
  // An absent gain is 1.
  for (const Site site : test::kInputSites) {
    EXPECT_TRUE(at::equal(written.points.at(site).gain, at::ones({site_shape(site, config).features})));
    written.points.at(site).gain = Tensor{};
  }
  const auto got = state_tensors(written), expected = state_tensors(state);
  ASSERT_EQ(got.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    if (tensor.is_floating_point()) {
      EXPECT_TRUE(at::allclose(got.at(name), tensor, 1e-6, 1e-7)) << name;
    } else {
      EXPECT_TRUE(at::equal(got.at(name), tensor)) << name;
    }
  }
}

TEST_P(LearnedParameters, AClipOfOneBeginsWhereItHasAGradient) {
  BlockState state = rich_state();
  state.points.at(Site::kO).clip.fill_(1);
  for (const Parameter& parameter : make(state, {{"o.clip", 1}})) {
    EXPECT_TRUE(parameter.leaves[0].isfinite().all().item<bool>());
    parameter.write(state);
  }
  EXPECT_NEAR(state.points.at(Site::kO).clip.item<double>(), 0.999, 1e-6);
}

TEST_P(LearnedParameters, NoValueLeavesItsRange) {
  BlockState state = rich_state();
  for (const Parameter& parameter : make(state, {{"*.scale", 1}, {"value.matrix", 1}, {"*.clip", 1}})) {
    const c10::NoGradGuard no_grad;
    for (const Tensor& leaf : parameter.leaves) leaf.copy_(3 * test::random_normal(leaf.sizes(), 4, at::kFloat));
    parameter.write(state);
  }
  for (const auto& [site, point] : state.points) {
    EXPECT_GT(point.clip.min().item<double>(), 0);
    EXPECT_LT(point.clip.max().item<double>(), 1);
  }
  for (auto& [site, transform] : state.transforms) {
    for (const Factor& factor : transform) {
      if (factor.kind == Factor::Kind::kScale) {
        EXPECT_GT(factor.left.min().item<double>(), 0);
        EXPECT_TRUE(at::allclose(factor.left * factor.left_inverse, at::ones_like(factor.left), 1e-5));
      } else {
        const Tensor product = at::matmul(factor.left, factor.left_inverse);
        EXPECT_TRUE(at::allclose(product, at::eye(shape.head_dim).expand_as(product), 1e-4, 1e-4));
      }
    }
  }
}

TEST_P(LearnedParameters, ReachTheLinearsAroundTheirSite) {
  std::map<std::string, std::vector<std::string>> reaches;
  std::map<std::string, bool> moves;
  for (const Parameter& parameter :
       make(rich_state(), {{"*.scale", 1}, {"*.matrix", 1}, {"o.clip", 1}, {"mlp.up_proj.weight_clip", 1}})) {
    reaches[parameter.name] = parameter.reaches;
    std::sort(reaches[parameter.name].begin(), reaches[parameter.name].end());
    moves[parameter.name] = parameter.moves;
  }
  using Names = std::vector<std::string>;
  EXPECT_EQ(reaches.at("value.matrix"), (Names{"self_attn.o_proj", "self_attn.v_proj"}));
  EXPECT_EQ(reaches.at("value.scale"), (Names{"self_attn.o_proj", "self_attn.v_proj"}));
  EXPECT_EQ(reaches.at("qkv.scale"), (Names{"self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"}));
  EXPECT_EQ(reaches.at("down.scale"), (Names{"mlp.down_proj"}));
  EXPECT_EQ(reaches.at("mlp.up_proj.weight_clip"), (Names{"mlp.up_proj"}));
  EXPECT_TRUE(reaches.at("o.clip").empty());
  EXPECT_TRUE(moves.at("value.matrix") && moves.at("down.scale"));
  EXPECT_FALSE(moves.at("mlp.up_proj.weight_clip") || moves.at("o.clip"));
}

INSTANTIATE_TEST_SUITE_P(Shapes, LearnedParameters, testing::ValuesIn(test::llama_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
