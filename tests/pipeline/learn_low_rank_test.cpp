#include <map>
#include <string>

#include "learning_test.h"

namespace baseq {
namespace {

class LearnLowRank : public test::LearningTest {};

/// Weights alone, and what round_layer makes of them.
Recipe fbquant_recipe(at::ScalarType dtype) {
  Recipe recipe;
  recipe.weights = QuantSpec{.num_bits = 3};
  recipe.gptq.mse_clip = false;
  recipe.low_rank = Recipe::LowRank{.method = Recipe::LowRank::Method::kFbquant, .rank = 4, .dtype = dtype};
  recipe.low_rank->fbquant.steps = 30;
  recipe.products = at::kFloat;
  return recipe;
}

std::map<std::string, Tensor> weights_of(const DecoderLayer& layer) {
  std::map<std::string, Tensor> weights;
  layer.for_each_linear([&](const std::string& name, const Linear& linear) { weights[name] = linear.weight; });
  return weights;
}

TEST_P(LearnLowRank, BlockObjectiveStartsAtTheLayersAndLowersTheBlocksLoss) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kChar}) {
    recipe = fbquant_recipe(dtype);
    recipe.low_rank->block_epochs = 6;
    recipe.low_rank->block_learning_rate = 0.05;
    DecoderLayer learned = layer;
    round_layer(learned, recipe, inputs, weights, 0, {});
    const double before = loss_of(learned);
    learn_low_rank(learned, weights_of(layer), task());
    ASSERT_FALSE(stages.empty());
    EXPECT_EQ(stages.back().stage, "low_rank");
    EXPECT_NEAR(stages.back().loss_before / before, 1, 1e-4) << dtype;
    EXPECT_LT(loss_of(learned), 0.98 * before) << dtype;
    EXPECT_NEAR(stages.back().loss_after / loss_of(learned), 1, 1e-4);
    const auto originals = weights_of(layer);
    learned.for_each_linear([&](const std::string& name, Linear& linear) {
      EXPECT_TRUE(at::equal(linear.weight, linear.dequantized())) << name;
      EXPECT_EQ(linear.lora.A.scalar_type(), dtype) << name;
      const Tensor steps = (linear.weight - originals.at(name)).abs() / linear.quantized->qparams.scale;
      EXPECT_LE(steps.max().item<double>(), 0.5 + 1e-3) << name;
    });
  }
}

TEST_P(LearnLowRank, BlockObjectiveKeepsTheLayersResultWhenNoEpochIsBetter) {
  recipe = fbquant_recipe(at::kChar);
  recipe.low_rank->block_epochs = 1;
  recipe.low_rank->block_learning_rate = 10;
  DecoderLayer learned = layer;
  round_layer(learned, recipe, inputs, weights, 0, {});
  const auto before = layer_tensors(learned, "", at::kFloat);
  learn_low_rank(learned, weights_of(layer), task());
  ASSERT_EQ(stages.back().loss_after, stages.back().loss_before);
  for (const auto& [name, tensor] : layer_tensors(learned, "", at::kFloat)) {
    EXPECT_TRUE(at::equal(tensor, before.at(name))) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, LearnLowRank, testing::ValuesIn(test::tiny_shapes()),
                         [](const auto& shape) { return shape.param.name; });

}  // namespace
}  // namespace baseq
