#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "block_test.h"
#include "pipeline/activation_ranges.h"

namespace baseq {
namespace {

using By = ChooseStep::By;
using StepKind = TransformStep::Kind;

class Choose : public test::BlockTest {
 protected:
  Choose() : BlockTest(at::kDouble) {
    grids = test::grids_of_bits(4, shape);
    report = [this](const ProgressEvent& event) {
      if (const auto* chosen = std::get_if<TransformChosen>(&event)) choices.push_back(*chosen);
    };
  }
  /// What `by` keeps at the inputs and at the caches, from nothing, a Hadamard transform, and both after smoothing.
  BlockState choose(By by, const std::vector<Site>& at) {
    OpenBlock block = open_block();
    std::vector<std::vector<TransformStep>> from = {{}, {TransformStep{}}};
    if (site_info(at[0]).is_input()) from.push_back({TransformStep{.kind = StepKind::kSmooth}, TransformStep{}});
    run(block, {ChooseStep{.at = at, .from = from, .by = by}});
    EXPECT_LT(test::relative_error(block.layer().forward(x, inputs.rope), target), 1e-10);
    return block.state();
  }

  std::vector<TransformChosen> choices;
};

TEST_P(Choose, KeepsTheChainWithTheLeastScore) {
  for (const By by : {By::kBlockLoss, By::kRoundingError, By::kDifficulty}) {
    for (const auto& at : {test::kInputSites, test::kCacheSites}) {
      choices.clear();
      const BlockState state = choose(by, at);
      ASSERT_EQ(choices.size(), at.size());
      for (size_t i = 0; i < at.size(); ++i) {
        const TransformChosen& chosen = choices[i];
        EXPECT_EQ(chosen.site, site_info(at[i]).name);
        EXPECT_EQ(chosen.scores.size(), site_info(at[i]).is_input() ? 3U : 2U);
        const auto least = std::min_element(chosen.scores.begin(), chosen.scores.end());
        EXPECT_EQ(chosen.chosen, least - chosen.scores.begin());
        const size_t factors = state.transforms.contains(at[i]) ? state.transforms.at(at[i]).size() : 0;
        EXPECT_EQ(static_cast<int64_t>(factors), chosen.chosen);
        EXPECT_EQ(chosen.chain, (std::vector<std::string>{"none", "hadamard", "smooth, hadamard"})[factors]);
      }
    }
  }
}

TEST_P(Choose, AnInputThatIsFlatStaysAsItIs) {
  // Weights of one magnitude, which a Hadamard transform would spread, and no input.
  layer.mlp.gate_proj.weight.zero_();
  layer.mlp.down_proj.weight = layer.mlp.down_proj.weight.sign();
  if (layer.mlp.gate_proj.bias.defined()) layer.mlp.gate_proj.bias.zero_();
  target = layer.forward(x, inputs.rope);
  choose(By::kRoundingError, {Site::kDown});
  EXPECT_EQ(choices.at(0).chosen, 0);
  EXPECT_EQ(choices.at(0).chain, "none");
}

TEST_P(Choose, TheRootMeanSquareDecidesBetweenTwo) {
  for (const double threshold : {0.0, 1e9}) {
    OpenBlock block = open_block();
    run(block,
        {ChooseStep{.at = {Site::kQkv}, .from = {{}, {TransformStep{}}}, .by = By::kRms, .threshold = threshold}});
    EXPECT_EQ(choices.back().chosen, threshold > 0 ? 0 : 1);
    const Tensor seen = layer.input_of(Site::kQkv, x, inputs.rope);
    EXPECT_NEAR(choices.back().scores.at(0), seen.square().mean().sqrt().item<double>(), 1e-9);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Choose, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(Difficulty, IsTheSpreadOfTheNormsOfChannels) {
  // Norms 5, 13 and 0: mean 6, squares 1 + 49 + 36.
  const Tensor x = at::tensor({3.0, 5.0, 0.0, 4.0, 12.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}).view({4, 3});
  EXPECT_NEAR(difficulty(x), std::sqrt(86.0 / 3), 1e-12);
  EXPECT_NEAR(difficulty(at::ones({5, 7})), 0, 1e-6);
}

}  // namespace
}  // namespace baseq
