#include "block_test.h"

namespace baseq {
namespace {

class LearnLowRank : public test::BlockTest {
 protected:
  LearnLowRank() {
    grids.weights = QuantSpec{.num_bits = 3};
    rounding.mse_clip = false;
  }
  RoundStep fbquant(at::ScalarType factors) const {
    RoundStep step{.gptq = rounding,
                   .low_rank = LowRankOptions{.method = LowRankOptions::Method::kFbquant, .rank = 4, .dtype = factors}};
    step.low_rank->steps = 30;
    return step;
  }
  LearnStep learn{.name = "low_rank", .epochs = 6, .rates = {{"*.low_rank", 0.05}}, .products = at::kFloat};
};

TEST_P(LearnLowRank, BlockObjectiveStartsAtTheLayersAndLowersTheBlocksLoss) {
  for (const at::ScalarType factors : {at::kBFloat16, at::kChar}) {
    OpenBlock block = open_block();
    run(block, {fbquant(factors)});
    const double before = loss_of(block.layer());
    run(block, {learn});
    ASSERT_FALSE(stages.empty());
    EXPECT_EQ(stages.back().stage, "low_rank");
    EXPECT_NEAR(stages.back().loss_before / before, 1, 1e-4) << factors;
    EXPECT_LT(loss_of(block.layer()), 0.98 * before) << factors;
    EXPECT_NEAR(stages.back().loss_after / loss_of(block.layer()), 1, 1e-4);
    block.layer().for_each_linear([&](const std::string& name, const Linear& linear) {
      EXPECT_TRUE(at::equal(linear.weight, linear.dequantized())) << name;
      EXPECT_EQ(linear.lora.A.scalar_type(), factors) << name;
      const Tensor steps = (linear.weight - layer.linear(name).weight).abs() / linear.quantized->qparams.scale;
      EXPECT_LE(steps.max().item<double>(), 0.5 + 1e-3) << name;
    });
  }
}

TEST_P(LearnLowRank, BlockObjectiveKeepsTheLayersResultWhenNoEpochIsBetter) {
  learn.epochs = 1;
  learn.rates.at("*.low_rank") = 10;
  OpenBlock block = open_block();
  run(block, {fbquant(at::kChar)});
  const BlockState state = block.state();
  const DecoderLayer before = block.layer();
  run(block, {learn});
  ASSERT_EQ(stages.back().loss_after, stages.back().loss_before);
  test::expect_same_state(block.state(), state);
  test::expect_same_layer(block.layer(), before);
}

TEST_P(LearnLowRank, TogetherWithTheClipsOfTheQuantPoints) {
  grids = test::grids_of_bits(3, shape);
  OpenBlock block = open_block(test::with_hadamards(config, {Site::kValue, Site::kDown}));
  run(block, {PointsStep{.at = test::kInputSites, .clip = 0.9}, fbquant(at::kBFloat16)});
  const BlockState before = block.state();
  learn.rates["*.clip"] = 3e-2;
  run(block, {learn});
  EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
  EXPECT_NEAR(stages.back().loss_after / loss_of(block.layer()), 1, 1e-4);
  EXPECT_FALSE(at::equal(block.state().points.at(Site::kO).clip, before.points.at(Site::kO).clip));
  EXPECT_FALSE(
      at::equal(block.state().weights.at("mlp.up_proj").low_rank.A, before.weights.at("mlp.up_proj").low_rank.A));
}

INSTANTIATE_TEST_SUITE_P(Shapes, LearnLowRank, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
