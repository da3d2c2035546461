// What a run does with weights of zeros, and with calibration tokens and weights that are not finite.
#include <cmath>
#include <fstream>
#include <limits>

#include "block_test.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TinyShape;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class TokensThatAreNotFinite : public test::BlockTest {
 protected:
  TokensThatAreNotFinite() {
    grids.weights = QuantSpec{.num_bits = 3};
    place.block = 2;
  }
  /// The first `count` windows become NaN: the streams, the target and with it the weights.
  void break_windows(int64_t count) {
    Tensor broken = x.clone();
    broken.narrow(0, 0, count).fill_(kNan);
    inputs.full_precision = inputs.quantized = broken;
    target = layer.forward(broken, inputs.rope);
    weights = token_weights(target, Recipe::TokenWeights::kInverseEnergy, at::kFloat);
  }
  DecoderLayer rounded(const RoundStep& step) const {
    OpenBlock block = open_block();
    run(block, {step});
    return block.take_layer();
  }
  static void expect_same_codes(const DecoderLayer& a, const DecoderLayer& b) {
    b.for_each_linear([&](const std::string& name, const Linear& linear) {
      EXPECT_TRUE(at::equal(a.linear(name).quantized->codes, linear.quantized->codes)) << name;
    });
  }
};

constexpr RoundStep::Method kGptqMethod = RoundStep::Method::kGptq;

TEST_P(TokensThatAreNotFinite, RoundingSeesTheOthersAlone) {
  const RoundStep step{.method = kGptqMethod, .compensate_streams = true};
  break_windows(2);
  const DecoderLayer with_broken = rounded(step);
  EXPECT_TRUE(warnings.empty()) << warnings.front();
  inputs.full_precision = inputs.quantized = x.narrow(0, 2, kSamples - 2);
  weights = weights.narrow(0, 2, kSamples - 2);
  expect_same_codes(with_broken, rounded(step));
}

TEST_P(TokensThatAreNotFinite, WhereNoneIsFiniteOneWarningNamesTheBlock) {
  break_windows(kSamples);
  const DecoderLayer result = rounded({.method = kGptqMethod, .compensate_streams = true});
  ASSERT_EQ(warnings.size(), 1U);
  EXPECT_NE(warnings[0].find("block 2, self_attn.q_proj"), std::string::npos) << warnings[0];
  result.for_each_linear([&](const std::string& name, const Linear& linear) {
    const Tensor& weight = layer.linear(name).weight;
    EXPECT_TRUE(at::equal(linear.quantized->codes, round_to_nearest(weight, *grids.weights, true).codes)) << name;
  });
  // Corrections of low rank as well end neither the run nor their block.
  using Method = LowRankOptions::Method;
  for (const Method method : {Method::kFbquant, Method::kQeraExact, Method::kQeraApprox, Method::kL2qer}) {
    warnings.clear();
    LowRankOptions low_rank{.method = method, .rank = 2};
    low_rank.steps = 3;
    const DecoderLayer corrected = rounded({.low_rank = low_rank});
    EXPECT_EQ(warnings.size(), 1U);
    corrected.for_each_linear([](const std::string& name, const Linear& linear) {
      EXPECT_TRUE(linear.weight.isfinite().all().item<bool>()) << name;
    });
  }
}

TEST_P(TokensThatAreNotFinite, LearningLeavesTheirWindowsOut) {
  using TransformKind = TransformStep::Kind;
  grids.input_activations = test::grids_of_bits(4, shape).input_activations;
  const auto points = [](const std::vector<Site>& at) {
    return PointsStep{.at = at, .clip = 0.8, .shift = PointsStep::Shift::kMean};
  };
  LearnStep transforms = test::learn_transforms(4), activations = test::learn_activations(4);
  transforms.num_monitored = activations.num_monitored = kSamples;
  for (const int64_t broken : {int64_t{1}, kSamples}) {
    SCOPED_TRACE(broken);
    break_windows(broken);
    warnings.clear();
    stages.clear();
    OpenBlock block = open_block();
    run(block, {TransformStep{.kind = TransformKind::kScale, .at = {Site::kValue, Site::kO, Site::kDown}},
                TransformStep{.kind = TransformKind::kMatrix, .at = {Site::kValue}}, points({Site::kO, Site::kDown}),
                transforms, points({Site::kQkv, Site::kGateUp}), activations});
    for (const std::string& warning : warnings) EXPECT_EQ(warning.find("NaN"), std::string::npos) << warning;
    EXPECT_EQ(stages.size(), broken == kSamples ? 0U : 2U);
    for (const StageLearned& stage : stages) EXPECT_TRUE(stage.loss_after <= stage.loss_before);
    for (const auto& [name, tensor] : layer_tensors(block.layer(), "", at::kFloat)) {
      EXPECT_TRUE(tensor.isfinite().all().item<bool>()) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, TokensThatAreNotFinite, testing::ValuesIn(test::llama_shapes()), test::shape_name);

class Zeros : public test::TinyRun {
 protected:
  /// A checkpoint whose weights that end in one of `names` are all `value`.
  void fill(const std::vector<std::string>& names, double value) {
    auto tensors = test::tiny_tensors(shape, 1);
    for (auto& [name, tensor] : tensors) {
      for (const std::string& ending : names) {
        if (name.ends_with(ending + ".weight")) tensor = at::full_like(tensor, value);
      }
    }
    std::filesystem::remove_all(directory / "in");
    test::write_checkpoint(directory / "in", test::tiny_config(shape), tensors);
    original.emplace(directory / "in");
  }
};

TEST_F(Zeros, ProjectionsOfZerosPassThroughTheWholeRecipe) {
  json plus = read_recipe_json("baseq-plus-w4a4kv4");
  plus["calibration"] = {{"num_samples", 4}, {"seq_len", 16}};
  json everything = json::parse(test::kEverything);
  for (const auto& names : std::vector<std::vector<std::string>>{
           {"o_proj"}, {"v_proj"}, {"down_proj"}, {"gate_proj", "up_proj"}, {"q_proj", "k_proj"}}) {
    for (const json& text : {plus, everything}) {
      SCOPED_TRACE(names.front() + " in " + text["name"].get<std::string>());
      fill(names, 0);
      std::vector<std::string> warnings;
      const ProgressFn progress = [&](const ProgressEvent& event) {
        if (const auto* warning = std::get_if<Warning>(&event)) warnings.push_back(warning->message);
        if (const auto* linear = std::get_if<LinearRounded>(&event)) {
          EXPECT_TRUE(std::isfinite(linear->relative_error));
        }
      };
      run(Recipe::from_json(text, "recipe"), "out", {.output = {.force = true}}, progress);
      for (const std::string& warning : warnings) {
        EXPECT_NE(warning.find("no epoch lowered the loss"), std::string::npos) << warning;
      }
      EXPECT_TRUE(logits("out").isfinite().all().item<bool>());
    }
  }
}

TEST_F(Zeros, AWeightThatIsNotFiniteIsNamedEvenWithoutAPlan) {
  fill({"layers.1.mlp.up_proj"}, kNan);
  for (const char* recipe : {test::kRoundToNearest, R"({"steps": [{"step": "transform", "at": ["residual"]}]})"}) {
    test::expect_error([&] { run(test::recipe_of(recipe), "out"); },
                       {"model.layers.1.mlp.up_proj.weight", "not finite"});
  }
  EXPECT_FALSE(std::filesystem::exists(directory / "out"));
}

}  // namespace
}  // namespace baseq
