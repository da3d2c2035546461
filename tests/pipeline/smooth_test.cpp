#include "pipeline/smooth.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "block_test.h"

namespace baseq {
namespace {

const std::vector<Site> kSmoothed = {Site::kQkv, Site::kValue, Site::kO, Site::kGateUp, Site::kDown};

class Smooth : public test::BlockTest {
 protected:
  Smooth() : BlockTest(at::kDouble) {}

  BlockMoments maxima() const { return measure_block(layer, x, inputs.rope, weights, {.with_maxima = true}); }
  /// The activations at a site, [tokens, features].
  Tensor seen(Site site) const {
    if (site != Site::kValue) return layer.input_of(site, x, inputs.rope).flatten(0, 1);
    return layer.self_attn.v_proj.forward(layer.input_of(Site::kQkv, x, inputs.rope)).flatten(0, 1);
  }
  /// The largest magnitude of the weights that read feature `j` of a site, element by element.
  double largest_weight(Site site, int64_t j) const {
    double largest = 0;
    for (const std::string_view reader : site_info(site).readers) {
      const Tensor& weight = layer.linear(reader).weight;
      std::vector<int64_t> columns = {j};
      if (site == Site::kValue) {
        columns.clear();
        const int64_t group = shape.num_heads / shape.num_kv_heads, dim = shape.head_dim;
        for (int64_t i = 0; i < group; ++i) columns.push_back((j / dim * group + i) * dim + j % dim);
      }
      for (const int64_t column : columns) {
        largest = std::max(largest, weight.select(1, column).abs().max().item<double>());
      }
    }
    return largest;
  }
};

TEST_P(Smooth, IsTheFormulaOfSmoothQuant) {
  const BlockMoments moments = maxima();
  for (const Site site : kSmoothed) {
    const Tensor values = seen(site);
    for (const double strength : {0.0, 0.3, 0.5, 1.0}) {
      SCOPED_TRACE(std::string(site_info(site).name) + ", strength " + std::to_string(strength));
      const Factor factor = smooth(layer, site, moments, strength);
      EXPECT_EQ(factor.kind, Factor::Kind::kScale);
      ASSERT_EQ(factor.left.numel(), values.size(1));
      for (int64_t j = 0; j < values.size(1); ++j) {
        const double input = values.select(1, j).abs().max().item<double>();
        const double divisor = std::pow(input, strength) / std::pow(largest_weight(site, j), 1 - strength);
        ASSERT_NEAR(factor.left[j].item<double>() * divisor, 1, 1e-10) << j;
        ASSERT_NEAR(factor.left_inverse[j].item<double>() / divisor, 1, 1e-10) << j;
      }
    }
  }
}

TEST_P(Smooth, ChannelsOfZerosKeepTheScaleOne) {
  layer.input_layernorm.weight[3] = 0;
  layer.mlp.gate_proj.weight.select(1, 5).zero_();
  layer.mlp.up_proj.weight.select(1, 5).zero_();
  layer.mlp.down_proj.weight.select(1, 2).zero_();
  target = layer.forward(x, inputs.rope);
  OpenBlock block = open_block();
  run(block, {TransformStep{.kind = TransformStep::Kind::kSmooth, .at = kSmoothed}});
  const auto scale = [&](Site site) { return block.state().transforms.at(site).at(0).left; };
  EXPECT_EQ(scale(Site::kQkv)[3].item<double>(), 1);
  EXPECT_EQ(scale(Site::kGateUp)[5].item<double>(), 1);
  EXPECT_EQ(scale(Site::kDown)[2].item<double>(), 1);
  for (const Site site : kSmoothed) EXPECT_TRUE(scale(site).isfinite().all().item<bool>()) << site_info(site).name;
  EXPECT_LT(test::relative_error(block.layer().forward(x, inputs.rope), target), 1e-10);
}

TEST_P(Smooth, AStepKeepsTheOutputAndMeasuresAllItsSitesBeforeItChangesOne) {
  OpenBlock block = open_block();
  run(block, {TransformStep{.kind = TransformStep::Kind::kSmooth, .at = kSmoothed, .strength = 0.7}});
  EXPECT_LT(test::relative_error(block.layer().forward(x, inputs.rope), target), 1e-10);
  const BlockMoments moments = maxima();
  for (const Site site : kSmoothed) {
    EXPECT_LT(
        test::relative_error(block.state().transforms.at(site).at(0).left, smooth(layer, site, moments, 0.7).left),
        1e-12)
        << site_info(site).name;
  }
}

TEST_P(Smooth, NeedsMaxima) {
  const BlockMoments moments = measure_block(layer, x, inputs.rope, weights);
  test::expect_error([&] { smooth(layer, Site::kQkv, moments, 0.5); }, {"smooth", "qkv"});
}

TEST_P(Smooth, HalfStrengthMakesInputsAndWeightsEquallyLarge) {
  OpenBlock block = open_block();
  run(block, {TransformStep{.kind = TransformStep::Kind::kSmooth, .at = {Site::kDown}}});
  const Tensor inputs_after = block.layer().input_of(Site::kDown, x, inputs.rope).flatten(0, 1).abs().amax(0);
  const Tensor weights_after = block.layer().mlp.down_proj.weight.abs().amax(0);
  EXPECT_LT(test::relative_error(inputs_after, weights_after), 1e-10);
}

TEST_P(Smooth, CoarseToFineScalesWhatStandsOutDownToTheOthers) {
  layer.input_layernorm.weight[3] = 60;
  layer.input_layernorm.weight[7] = 40;
  target = layer.forward(x, inputs.rope);
  OpenBlock block = open_block();
  run(block, {TransformStep{.kind = TransformStep::Kind::kCoarseToFine, .at = {Site::kQkv, Site::kO}}});
  EXPECT_LT(test::relative_error(block.layer().forward(x, inputs.rope), target), 1e-10);
  const Tensor scale = block.state().transforms.at(Site::kQkv).at(0).left;
  const Tensor values = seen(Site::kQkv).abs().amax(0);
  const double least = standing_out(values);
  const Tensor normal = values.masked_select(values.lt(least)).max();
  for (int64_t j = 0; j < values.numel(); ++j) {
    const bool outlier = values[j].item<double>() >= least;
    EXPECT_NEAR(scale[j].item<double>(), outlier ? (normal / values[j]).sqrt().item<double>() : 1, 1e-10) << j;
  }
  EXPECT_LT(scale[3].item<double>(), 1);
  EXPECT_LT(scale[7].item<double>(), 1);
}

TEST(StandingOut, IsTheSplitOfTheValuesFarAboveTheRest) {
  const Tensor alike = at::arange(1, 21, at::kDouble);
  EXPECT_EQ(standing_out(alike), std::numeric_limits<double>::infinity());
  // Quartiles near 6.5 and 17.5: above 34 they may stand out, and two of them do from the third.
  const Tensor values = at::cat({alike, at::tensor({36.0, 200.0, 210.0})});
  EXPECT_EQ(standing_out(values), 200);
  EXPECT_EQ(standing_out(values.flip(0)), 200);
  EXPECT_EQ(standing_out(at::cat({alike, at::tensor({90.0}, at::kDouble)})), 90);
  EXPECT_EQ(standing_out(at::ones({8}, at::kDouble)), std::numeric_limits<double>::infinity());
}

INSTANTIATE_TEST_SUITE_P(Shapes, Smooth, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
