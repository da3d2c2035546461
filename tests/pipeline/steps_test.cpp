#include "pipeline/steps.h"

#include "block_test.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;
using Start = TransformStep::Start;

/// The state of an interrupted recipe describes a block as well.
class HalfDone : public test::BlockTest {
 protected:
  HalfDone() : BlockTest(at::kDouble) { grids = test::grids_of_bits(4, shape); }
};

TEST_P(HalfDone, EveryStepLeavesABlock) {
  const std::vector<Site> balanced = {Site::kQkv, Site::kQueryKey, Site::kValue, Site::kGateUp, Site::kDown};
  const std::vector<Step> transforms = {
      TransformStep{.kind = StepKind::kBalance, .at = balanced},
      TransformStep{.kind = StepKind::kSmooth, .at = {Site::kQkv, Site::kValue, Site::kDown}},
      TransformStep{.kind = StepKind::kScale, .at = {Site::kValue, Site::kQueryKey, Site::kDown}},
      TransformStep{.kind = StepKind::kMatrix, .at = {Site::kValue}},
      TransformStep{.at = {Site::kResidual, Site::kValue, Site::kQueryKey, Site::kDown, Site::kQkv}},
      TransformStep{.kind = StepKind::kScale, .at = {Site::kO}},
      TransformStep{.at = {Site::kGateUp}},
      TransformStep{.kind = StepKind::kKronecker, .at = test::kInputSites, .start = Start::kRandom},
      TransformStep{.kind = StepKind::kKronecker, .at = {Site::kO}, .start = Start::kHadamard, .left_only = true},
      TransformStep{.kind = StepKind::kMatrix, .at = test::kCacheSites, .start = Start::kRandom},
      TransformStep{.kind = StepKind::kMatrix, .at = test::kInputSites, .start = Start::kGreedy, .block_size = 4},
      TransformStep{.kind = StepKind::kPermutation, .at = test::kInputSites, .block_size = 4},
      TransformStep{.kind = StepKind::kMatrix, .at = test::kInputSites, .start = Start::kHadamard},
      ChooseStep{.at = test::kInputSites, .from = {{}, {TransformStep{.kind = StepKind::kSmooth}, TransformStep{}}}}};
  OpenBlock block = open_block();
  for (const Step& step : transforms) {
    run(block, {step});
    EXPECT_LT(test::relative_error(block.layer().forward(x, inputs.rope), target), 1e-10);
  }
  const DecoderLayer transformed = block.layer();
  run(block, {PointsStep{.at = {Site::kO, Site::kDown}, .clip = 0.9},
              PointsStep{.at = test::kCacheSites, .shift = PointsStep::Shift::kMean}});
  // Points that are off have no part in it.
  EXPECT_LT(test::relative_error(without_quant_points(block.layer()).forward(x, inputs.rope), target), 1e-10);
  EXPECT_GT(loss_of(block.layer()), 0);
  block.layer().for_each_linear([&](const std::string& name, const Linear& linear) {
    EXPECT_TRUE(at::equal(linear.weight, transformed.linear(name).weight)) << name;
  });
  EXPECT_TRUE(warnings.empty());
  run(block, {RoundStep{.method = RoundStep::Method::kGptq}});
  const BlockState rounded = block.state();
  BlockState partly = rounded;
  transformed.for_each_linear([&](const std::string& name, const Linear& linear) {
    partly.weights.erase(name);  // one linear more without codes
    const DecoderLayer half = realize(layer, partly, place);
    EXPECT_TRUE(at::equal(half.linear(name).weight, linear.weight)) << name;
    EXPECT_FALSE(half.linear(name).quantized) << name;
    EXPECT_TRUE(half.forward(x, inputs.rope).isfinite().all().item<bool>()) << name;
    half.for_each_linear([&](const std::string& other, const Linear& of) {
      EXPECT_EQ(of.quantized.has_value(), partly.weights.contains(other));
      const DecoderLayer& expected = of.quantized ? block.layer() : transformed;
      EXPECT_TRUE(at::equal(of.weight, expected.linear(other).weight)) << other;
    });
  });
}

TEST_P(HalfDone, TheLayerOfAnOpenBlockIsThatOfItsState) {
  OpenBlock block = open_block();
  const auto expect_realized = [&](const char* after) {
    SCOPED_TRACE(after);
    test::expect_same_layer(block.layer(), realize(layer, block.state(), place));
    OpenBlock again = open_block(block.state());
    test::expect_same_layer(again.take_layer(), block.layer());
  };
  expect_realized("nothing");
  run(block, {TransformStep{.kind = StepKind::kScale, .at = {Site::kO}}, TransformStep{.at = {Site::kDown}}});
  expect_realized("transforms");
  run(block, {PointsStep{.at = {Site::kO, Site::kDown, Site::kValue}}});
  expect_realized("points");
  run(block, {RoundStep{}});
  expect_realized("rounding");
  run(block, {RoundStep{.low_rank = LowRankOptions{.method = LowRankOptions::Method::kSvd, .rank = 2}}});
  expect_realized("corrections");
  block.edit_points([](BlockState& state) { state.points.at(Site::kO).clip.fill_(0.5); });
  expect_realized("an edit of points");
  block.edit([](BlockState& state) { state.weights.clear(); });
  expect_realized("an edit");
}

INSTANTIATE_TEST_SUITE_P(Shapes, HalfDone, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(ResidualTransform, CollectsTheHadamardFactorsOfAllPasses) {
  const ModelConfig config = test::tiny_model_config({});
  const TransformStep hadamard{.at = {Site::kDown, Site::kResidual}}, other{.at = {Site::kDown}};
  EXPECT_TRUE(residual_transform({.passes = {{.steps = {other}}}}, config, at::kCPU).empty());
  const Transform transform =
      residual_transform({.passes = {{.steps = {other, hadamard}}, {.steps = {hadamard}}}}, config, at::kCPU);
  ASSERT_EQ(transform.size(), 2U);
  for (const Factor& factor : transform) {
    EXPECT_EQ(factor.kind, Factor::Kind::kHadamard);
    EXPECT_EQ(factor.size(), config.hidden_size);
  }
  const TransformStep scale{.kind = StepKind::kScale, .at = {Site::kResidual}};
  test::expect_error([&] { residual_transform({.passes = {{.steps = {scale}}}}, config, at::kCPU); },
                     {"residual", "hadamard"});
}

}  // namespace
}  // namespace baseq
