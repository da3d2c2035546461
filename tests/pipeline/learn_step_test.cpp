#include <cmath>
#include <limits>

#include "block_test.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;
using Shift = PointsStep::Shift;
using Weights = LearnStep::Weights;

/// BASE-Q's stages at 4 bits.
class Learn : public test::BlockTest {
 protected:
  Learn() { grids = test::grids_of_bits(4, shape); }

  LearnStep transforms = test::learn_transforms(1), activations = test::learn_activations(1);
  double clip = 0.9, cache_clip = 1;  ///< where they start

  static TransformStep hadamards() { return {.at = {Site::kValue, Site::kQueryKey, Site::kDown}}; }
  PointsStep points(const std::vector<Site>& at) const {
    return {.at = at, .clip = at == test::kCacheSites ? cache_clip : clip, .shift = Shift::kMean};
  }
  std::vector<Step> quarot() const { return {hadamards(), points(test::kInputSites), points(test::kCacheSites)}; }
  /// The transforms that a step learns.
  std::vector<Step> identities() const {
    return {TransformStep{.kind = StepKind::kScale, .at = {Site::kValue, Site::kDown}},
            TransformStep{.kind = StepKind::kMatrix, .at = {Site::kValue}}, hadamards(),
            TransformStep{.kind = StepKind::kScale, .at = {Site::kO}}, points({Site::kO, Site::kDown})};
  }
  void learn_transforms(OpenBlock& block) const {
    run(block, identities());
    run(block, {transforms, points({Site::kQkv, Site::kGateUp}), points(test::kCacheSites)});
  }
  static void set_rates(LearnStep& step, double rate) {
    for (auto& [name, value] : step.rates) value = rate;
    step.final_rate = rate;
  }
};

TEST_P(Learn, TransformsLeaveTheMeansAfterNorms) {
  transforms.epochs = 3;
  for (const char* scale : {"value.scale", "o.scale", "down.scale"}) transforms.rates.at(scale) = 0.1;
  const Tensor mean = layer.input_of(Site::kGateUp, x, inputs.rope).mean({0, 1});
  OpenBlock block = open_block();
  learn_transforms(block);
  EXPECT_LT(test::relative_error(block.layer().mlp.input.shift, mean), 1e-4);
}

TEST_P(Learn, ActivationsLowerTheLoss) {
  for (const at::ScalarType products : {at::kFloat, at::kBFloat16}) {
    activations.products = products;
    activations.epochs = 6;
    OpenBlock block = open_block();
    run(block, quarot());
    run(block, {RoundStep{}});
    const double before = loss_of(block.layer());
    run(block, {activations});
    EXPECT_LT(loss_of(block.layer()), before) << products;
    ASSERT_FALSE(stages.empty());
    EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
    if (products == at::kFloat) {
      EXPECT_NEAR(stages.back().loss_after / loss_of(block.layer()), 1.0, 1e-4);
    }
  }
}

TEST_P(Learn, ActivationsNeverEndAboveTheirStart) {
  set_rates(activations, 10);
  OpenBlock block = open_block();
  run(block, quarot());
  run(block, {RoundStep{}});
  const double before = loss_of(block.layer());
  run(block, {activations});
  // A clip of exactly 1 starts at 0.999, so equality is up to that.
  EXPECT_LE(loss_of(block.layer()), before * 1.01);
  EXPECT_LE(stages.back().loss_after, stages.back().loss_before);
}

TEST_P(Learn, WhereNoEpochIsBetterTheStateIsWhatItWas) {
  clip = 1;
  // So far that nothing can be better.
  set_rates(transforms, 10);
  set_rates(activations, 10);
  OpenBlock block = open_block();
  const auto expect_kept = [&](const LearnStep& step) {
    const BlockState before = block.state();
    const DecoderLayer layer_before = block.layer();
    run(block, {step});
    ASSERT_EQ(stages.back().loss_after, stages.back().loss_before) << "an epoch was better";
    ASSERT_FALSE(warnings.empty());
    EXPECT_NE(warnings.back().find("block 0, " + step.name + ": "), std::string::npos);
    test::expect_same_state(block.state(), before);
    test::expect_same_layer(block.layer(), layer_before);
    for (const auto& [site, point] : block.state().points) {
      EXPECT_TRUE(at::equal(point.clip, at::ones_like(point.clip))) << site_info(site).name;
      EXPECT_FALSE(point.clip.requires_grad()) << site_info(site).name;
    }
  };
  run(block, identities());
  expect_kept(transforms);
  run(block, {points({Site::kQkv, Site::kGateUp}), points(test::kCacheSites)});
  expect_kept(activations);
  run(block, {RoundStep{}});
  expect_kept(activations);
  // One that looks past the codes leaves them alone as well.
  LearnStep clips = transforms;
  clips.rates = {{"*.weight_clip", 10}, {"value.scale", 10}};
  clips.final_rate = 10;
  expect_kept(clips);
}

TEST_P(Learn, ALossThatIsNotFiniteEndsTheStepAndKeepsTheState) {
  activations.epochs = transforms.epochs = 3;
  activations.num_monitored = transforms.num_monitored = 1;  // the first window
  target = target.clone();
  target[kSamples - 1].fill_(std::numeric_limits<double>::quiet_NaN());
  OpenBlock block = open_block();
  run(block, identities());
  for (const LearnStep& step : {transforms, activations}) {
    if (step.name == activations.name) run(block, {points(test::kCacheSites), RoundStep{}});
    const BlockState before = block.state();
    warnings.clear();
    run(block, {step});
    ASSERT_EQ(warnings.size(), 1U);
    EXPECT_NE(warnings[0].find("block 0, " + step.name + ": the loss became NaN"), std::string::npos) << warnings[0];
    EXPECT_EQ(stages.back().loss_after, stages.back().loss_before);
    test::expect_same_state(block.state(), before);
  }
}

TEST_P(Learn, ActivationsLeaveWeightsAlone) {
  OpenBlock block = open_block();
  run(block, quarot());
  const DecoderLayer before = block.layer();
  run(block, {activations});
  block.layer().for_each_linear([&](const std::string& name, const Linear& linear) {
    EXPECT_TRUE(at::equal(linear.weight, before.linear(name).weight)) << name;
  });
  block.layer().for_each_quant_point([](const std::string& name, const QuantPoint& point) {
    EXPECT_FALSE(point.clip.requires_grad() || point.shift.requires_grad()) << name;
  });
}

TEST_P(Learn, TransformsKeepShapesAndDoNotRaiseTheLoss) {
  for (const at::ScalarType products : {at::kFloat, at::kBFloat16}) {
    transforms.products = products;
    OpenBlock block = open_block();
    learn_transforms(block);
    ASSERT_FALSE(stages.empty());
    EXPECT_LE(stages.back().loss_after, stages.back().loss_before) << products;
    EXPECT_TRUE(std::isfinite(stages.back().loss_after));
    const DecoderLayer& learned = block.layer();
    learned.for_each_linear([&](const std::string& name, const Linear& linear) {
      EXPECT_EQ(linear.weight.sizes(), layer.linear(name).weight.sizes()) << name;
      EXPECT_EQ(linear.weight.scalar_type(), at::kFloat) << name;
      EXPECT_EQ(linear.bias.defined(), layer.linear(name).bias.defined()) << name;
      EXPECT_FALSE(linear.weight.requires_grad()) << name;
    });
    EXPECT_FALSE(learned.mlp.down_scale.defined());
    EXPECT_FALSE(learned.mlp.down_transform.empty() || learned.self_attn.query_key_transform.empty());
    EXPECT_TRUE(learned.self_attn.o_transform.empty());
    for (const auto& [name, tensor] : state_tensors(block.state())) EXPECT_FALSE(tensor.requires_grad()) << name;
  }
}

TEST_P(Learn, TransformsKeepTheUnquantizedOutput) {
  transforms.epochs = 12;
  OpenBlock block = open_block();
  learn_transforms(block);
  // Gains stay, for o_proj divides them out.
  EXPECT_LT(test::relative_error(without_quant_points(block.layer()).forward(x, inputs.rope), target), 2e-5);
  EXPECT_FALSE(at::allclose(block.layer().self_attn.o_input.gain, at::ones({shape.num_heads * shape.head_dim})));
}

TEST_P(Learn, TransformsAtTheirStartAreTheFixedOnes) {
  set_rates(transforms, 0);
  OpenBlock learned = open_block(), fixed = open_block();
  learn_transforms(learned);
  run(fixed, quarot());
  // The identity by Cayley, scales of 1 and the Hadamard of the same dtype: bit for bit the same weights.
  learned.layer().for_each_linear([&](const std::string& name, const Linear& linear) {
    EXPECT_TRUE(at::equal(linear.weight, fixed.layer().linear(name).weight)) << name;
  });
  for (const SiteInfo& info : sites()) {
    if (info.point.empty()) continue;
    const QuantPoint &point = learned.layer().point(info.site), &wanted = fixed.layer().point(info.site);
    EXPECT_LT(test::relative_error(point.clip, wanted.clip), 1e-6) << info.name;
    EXPECT_TRUE(at::allclose(point.shift, wanted.shift, 1e-5, 1e-6)) << info.name;
  }
  for (OpenBlock* block : {&learned, &fixed}) run(*block, {RoundStep{.method = RoundStep::Method::kGptq}});
  learned.layer().for_each_linear([&](const std::string& name, const Linear& linear) {
    EXPECT_TRUE(at::equal(linear.quantized->codes, fixed.layer().linear(name).quantized->codes)) << name;
  });
}

TEST_P(Learn, SameSeedSameBytes) {
  const auto learned = [&] {
    OpenBlock block = open_block();
    learn_transforms(block);
    run(block, {RoundStep{}, activations});
    return block.state();
  };
  test::expect_same_state(learned(), learned());
}

TEST_P(Learn, ParametersOfAllKindsTogether) {
  LearnStep joint = transforms;
  joint.name = "joint";
  joint.weights = Weights::kExact;
  joint.epochs = 16;
  joint.rates = {{"*.clip", 3e-2}, {"*.gain", 3e-3}, {"value.matrix", 3e-3}};
  joint.final_rate = 3e-5;
  std::map<std::string, double> alone;
  const auto loss_after = [&](const LearnStep& step) {
    OpenBlock block = open_block();
    run(block, {TransformStep{.kind = StepKind::kMatrix, .at = {Site::kValue}}});
    run(block, quarot());
    run(block, {step});
    EXPECT_LE(stages.back().loss_after, stages.back().loss_before);
    return stages.back().loss_after;
  };
  for (const auto& [name, rate] : joint.rates) {
    LearnStep single = joint;
    single.rates = {{name, rate}};
    alone[name] = loss_after(single);
  }
  const double together = loss_after(joint);
  EXPECT_LT(together, stages.back().loss_before);
  for (const auto& [name, loss] : alone) EXPECT_LT(together, loss) << name;
}

TEST_P(Learn, LearnedClipsOfWeightsLowerTheLossOfTheRoundedBlock) {
  LearnStep clips = transforms;
  clips.epochs = 8;
  clips.rates = {{"*.weight_clip", 0.2}};
  grids.weights->num_bits = 3;
  rounding.mse_clip = false;
  RoundStep nearest{};
  nearest.gptq.mse_clip = false;
  OpenBlock learned = open_block();
  run(learned, {clips, nearest});
  EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
  EXPECT_NEAR(stages.back().loss_after / loss_of(learned.layer()), 1, 1e-4);
  for (const auto& [name, weight] : learned.state().weights) {
    EXPECT_TRUE(weight.clip.defined() && weight.codes) << name;
    EXPECT_FALSE(weight.clip.requires_grad()) << name;
  }
}

TEST_P(Learn, AStepWithoutRoundedWeightsLearnsPastCodes) {
  // A step that moves the weights invalidates the codes of an earlier round step.
  for (const Weights kind : {Weights::kExact, Weights::kStraightThrough}) {
    LearnStep step = transforms;
    step.weights = kind;
    step.epochs = 4;
    step.rates = {{"value.matrix", 1e-4}, {"*.clip", 3e-2}, {"*.gain", 3e-3}};
    OpenBlock fresh = open_block(), rounded = open_block();
    for (OpenBlock* block : {&fresh, &rounded}) {
      run(*block, {TransformStep{.kind = StepKind::kMatrix, .at = {Site::kValue}}});
      run(*block, quarot());
    }
    run(rounded, {RoundStep{.method = RoundStep::Method::kGptq}});
    run(fresh, {step});
    run(rounded, {step});
    ASSERT_LT(stages.back().loss_after, stages.back().loss_before);
    EXPECT_FALSE(has_codes(rounded.state()));
    test::expect_same_state(rounded.state(), fresh.state());
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Learn, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
