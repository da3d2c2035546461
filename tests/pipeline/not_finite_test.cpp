// What a run does with weights of zeros, and with calibration tokens and weights that are not finite.
#include <cmath>
#include <fstream>
#include <limits>

#include "learning_test.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TinyShape;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class TokensThatAreNotFinite : public test::LearningTest {
 protected:
  TokensThatAreNotFinite() {
    recipe.weights = QuantSpec{.num_bits = 3};
    recipe.products = at::kFloat;
    recipe.num_monitored = kSamples;
    progress = [this](const ProgressEvent& event) {
      if (const auto* warning = std::get_if<Warning>(&event)) warnings.push_back(warning->message);
      if (const auto* stage = std::get_if<StageLearned>(&event)) stages.push_back(*stage);
    };
  }
  /// The first `count` windows become NaN: the streams, the target and with it the weights.
  void break_windows(int64_t count) {
    Tensor broken = x.clone();
    broken.narrow(0, 0, count).fill_(kNan);
    inputs.full_precision = inputs.quantized = broken;
    target = layer.forward(broken, inputs.rope);
    weights = token_weights(target, Recipe::Loss::kRelative, at::kFloat);
  }
  DecoderLayer rounded() const {
    DecoderLayer result = layer;
    round_layer(result, recipe, inputs, weights, 2, progress);
    return result;
  }
  static void expect_same_codes(const DecoderLayer& a, const DecoderLayer& b) {
    b.for_each_linear([&](const std::string& name, const Linear& linear) {
      EXPECT_TRUE(at::equal(a.linear(name).quantized->codes, linear.quantized->codes)) << name;
    });
  }

  std::vector<std::string> warnings;
};

TEST_P(TokensThatAreNotFinite, RoundingSeesTheOthersAlone) {
  recipe.rounding = Recipe::Rounding::kGptq;
  recipe.compensate_streams = true;
  break_windows(2);
  const DecoderLayer with_broken = rounded();
  EXPECT_TRUE(warnings.empty()) << warnings.front();
  inputs.full_precision = inputs.quantized = x.narrow(0, 2, kSamples - 2);
  weights = weights.narrow(0, 2, kSamples - 2);
  expect_same_codes(with_broken, rounded());
}

TEST_P(TokensThatAreNotFinite, WhereNoneIsFiniteOneWarningNamesTheBlock) {
  break_windows(kSamples);
  recipe.rounding = Recipe::Rounding::kGptq;
  recipe.compensate_streams = true;
  const DecoderLayer result = rounded();
  ASSERT_EQ(warnings.size(), 1U);
  EXPECT_NE(warnings[0].find("block 2, self_attn.q_proj"), std::string::npos) << warnings[0];
  result.for_each_linear([&](const std::string& name, const Linear& linear) {
    const Tensor& weight = layer.linear(name).weight;
    EXPECT_TRUE(at::equal(linear.quantized->codes, round_to_nearest(weight, *recipe.weights, true).codes)) << name;
  });
  // Corrections of low rank as well end neither the run nor their block.
  recipe.compensate_streams = false;
  for (const auto method : {Recipe::LowRank::Method::kFbquant, Recipe::LowRank::Method::kQeraExact,
                            Recipe::LowRank::Method::kQeraApprox, Recipe::LowRank::Method::kL2qer}) {
    recipe.rounding = Recipe::Rounding::kNearest;
    recipe.low_rank = Recipe::LowRank{.method = method, .rank = 2};
    recipe.low_rank->fbquant.steps = 3;
    warnings.clear();
    const DecoderLayer corrected = rounded();
    EXPECT_EQ(warnings.size(), 1U);
    corrected.for_each_linear([](const std::string& name, const Linear& linear) {
      EXPECT_TRUE(linear.weight.isfinite().all().item<bool>()) << name;
    });
  }
}

TEST_P(TokensThatAreNotFinite, LearningLeavesTheirWindowsOut) {
  recipe.input_activations.emplace();
  recipe.input_activations->spec = {.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  recipe.input_activations->clip = 0.8;
  recipe.input_activations->shift = recipe.input_activations->norm_shift = Recipe::Shift::kMean;
  recipe.learn_activations.epochs = recipe.learn_transforms.epochs = 4;
  for (const int64_t broken : {int64_t{1}, kSamples}) {
    SCOPED_TRACE(broken);
    break_windows(broken);
    warnings.clear();
    stages.clear();
    DecoderLayer learned = layer;
    learn_transforms(learned, task());
    learn_activations(learned, task());
    for (const std::string& warning : warnings) EXPECT_EQ(warning.find("NaN"), std::string::npos) << warning;
    EXPECT_EQ(stages.size(), broken == kSamples ? 0U : 2U);
    for (const StageLearned& stage : stages) EXPECT_TRUE(stage.loss_after <= stage.loss_before);
    for (const auto& [name, tensor] : layer_tensors(learned, "", at::kFloat)) {
      EXPECT_TRUE(tensor.isfinite().all().item<bool>()) << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, TokensThatAreNotFinite, testing::ValuesIn(test::llama_shapes()),
                         [](const auto& shape) { return shape.param.name; });

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
  std::ifstream file(std::filesystem::path(BASEQ_SOURCE_DIR) / "configs" / "baseq-plus-w4a4kv4.json");
  json plus = json::parse(file);
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
      run(Recipe::from_json(text, "recipe"), "out", {.output = {.force = true}, .progress = progress});
      for (const std::string& warning : warnings) {
        EXPECT_NE(warning.find("no epoch lowered the loss"), std::string::npos) << warning;
      }
      EXPECT_TRUE(logits("out").isfinite().all().item<bool>());
    }
  }
}

TEST_F(Zeros, AWeightThatIsNotFiniteIsNamedEvenWithoutAPlan) {
  fill({"layers.1.mlp.up_proj"}, kNan);
  for (const char* recipe : {R"({"weights": {}})", R"({"weights": {}, "transforms": {"residual": "hadamard"}})"}) {
    test::expect_error([&] { run(test::recipe_of(recipe), "out"); },
                       {"model.layers.1.mlp.up_proj.weight", "not finite"});
  }
  EXPECT_FALSE(std::filesystem::exists(directory / "out"));
}

}  // namespace
}  // namespace baseq
