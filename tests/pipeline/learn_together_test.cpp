// Learn steps over a window of two blocks.
#include <cmath>

#include "block_test.h"
#include "pipeline/candidate.h"

namespace baseq {
namespace {

using Weights = LearnStep::Weights;

/// Two blocks in float64 whose target is that of two others.
class LearnTogether : public test::BlockTest {
 protected:
  LearnTogether() : BlockTest(at::kDouble) {
    grids = {.weights = QuantSpec{.num_bits = 3}};
    target = test::tiny_layer(shape, 6).forward(test::tiny_layer(shape, 5).forward(x, inputs.rope), inputs.rope);
  }

  OpenBlock open(uint64_t seed) const {
    return OpenBlock({}, place, [this, seed] { return test::tiny_layer(shape, seed); });
  }
  /// Blocks after a step over both.
  std::vector<BlockState> learned(const LearnStep& step, const std::vector<Step>& before = {}) {
    OpenBlock first = open(1), second = open(2);
    run(first, before), run(second, before);
    const BlockTask given = task();
    learn_together(step, {{first, given}, {second, given}});
    return {first.state(), second.state()};
  }
  Tensor output_of(const std::vector<BlockState>& states) const {
    Tensor hidden = x;
    for (uint64_t i = 0; i < 2; ++i) {
      hidden = realize(test::tiny_layer(shape, 1 + i), states[i], place).forward(hidden, inputs.rope);
    }
    return hidden;
  }
  double squared_error(const std::vector<BlockState>& states) const {
    return (output_of(states) - target).square().mean().item<double>();
  }
  static LearnStep one_step(double rate) {
    return {.weights = Weights::kExact,
            .steps = 1,
            .rule = LearnStep::Rule::kSign,
            .rates = {{"*.norm", rate}},
            .schedule = LearnStep::Schedule::kConstant,
            .products = at::kDouble,
            .batch_size = kSamples};
  }
};

TEST_P(LearnTogether, EveryParameterOfBothBlocksMovesAgainstItsGradient) {
  constexpr double kRate = 1e-6, kDistance = 1e-5;
  const std::vector<BlockState> states = learned(one_step(kRate));
  for (size_t block = 0; block < 2; ++block) {
    for (const Site site : {Site::kQkv, Site::kGateUp}) {
      ASSERT_TRUE(states[block].norms.contains(site));
      const Tensor moved = (states[block].norms.at(site) - 1) / kRate;
      for (int64_t i = 0; i < moved.numel(); i += 3) {
        const auto loss_at = [&](double distance) {
          std::vector<BlockState> changed(2);
          changed[block].norms[site] = at::ones({shape.hidden_size}, at::kDouble);
          changed[block].norms[site][i] += distance;
          return squared_error(changed);
        };
        const double slope = (loss_at(kDistance) - loss_at(-kDistance)) / (2 * kDistance);
        EXPECT_NEAR(moved[i].item<double>(), slope > 0 ? -1 : 1, 1e-6) << block << " " << i;
      }
    }
  }
}

TEST_P(LearnTogether, TheFirstBlockLearnsForTheOutputOfTheSecond) {
  LearnStep step = one_step(1e-2);
  step.rule = LearnStep::Rule::kAdam;
  step.steps = 12;
  const std::vector<BlockState> together = learned(step);
  EXPECT_LT(squared_error(together), squared_error({{}, {}}));
  ASSERT_EQ(stages.size(), 1U);
  EXPECT_NEAR(stages[0].loss_before, squared_error({{}, {}}), 1e-9 * stages[0].loss_before);
  EXPECT_NEAR(stages[0].loss_after, squared_error(together), 1e-9 * stages[0].loss_after);
  // What it learns by itself for the same target is something else.
  OpenBlock alone = open(1);
  run(alone, {step});
  EXPECT_FALSE(at::allclose(alone.state().norms.at(Site::kQkv), together[0].norms.at(Site::kQkv), 0, 1e-6));
}

TEST_P(LearnTogether, OneBlockIsTheStepOverABlock) {
  const LearnStep step = one_step(1e-3);
  OpenBlock alone = open(1), window = open(1);
  run(alone, {step});
  const BlockTask given = task();
  learn_together(step, {{window, given}});
  EXPECT_EQ(stages.at(0).loss_after, stages.at(1).loss_after);
  test::expect_same_state(window.state(), alone.state());
}

TEST_P(LearnTogether, TheDivergenceIsOverFeatures) {
  LearnStep step = one_step(1e-4);
  step.loss = LearnStep::Loss::kMseKl;
  (void)learned(step);
  const Tensor output = output_of({{}, {}}), p = target.softmax(-1), q = output.softmax(-1);
  const Tensor divergence = (p * (p / q).log()).sum(-1);
  const double expected = (squared_error({{}, {}}) + divergence.mean() / double(shape.hidden_size)).item<double>();
  EXPECT_NEAR(stages.at(0).loss_before, expected, 1e-9 * expected);
}

TEST_P(LearnTogether, LoraIsAddedBeforeTheWeightIsRounded) {
  LearnStep step = one_step(2e-2);
  step.weights = Weights::kStraightThrough;
  step.rule = LearnStep::Rule::kAdam;
  step.steps = 16;
  step.rates = {{"*.weight_lora", 2e-2}};
  step.rank = 2;
  const std::vector<BlockState> states = learned(step);
  EXPECT_LT(stages.at(0).loss_after, stages.at(0).loss_before);
  RoundStep nearest{};
  nearest.gptq.mse_clip = false;
  for (size_t i = 0; i < 2; ++i) {
    const BlockState restored = state_from_tensors(state_tensors(states[i]), grids, at::kCPU);
    test::expect_same_state(restored, states[i]);
    OpenBlock block(restored, place, [&, i] { return test::tiny_layer(shape, 1 + i); });
    run(block, {nearest});
    for (const auto& [name, weight] : block.state().weights) {
      ASSERT_TRUE(weight.added.defined() && weight.codes) << name;
      EXPECT_FALSE(weight.added.A.requires_grad() || weight.added.B.requires_grad()) << name;
      EXPECT_EQ(weight.added.A.size(0), 2) << name;
      const Tensor before = test::tiny_layer(shape, 1 + i).linear(name).weight + weight.added.product();
      const QuantizedWeight expected = round_to_nearest(before, *grids.weights, false, {});
      EXPECT_TRUE(at::equal(weight.codes->codes, expected.codes)) << name;
    }
  }
}

TEST_P(LearnTogether, ThinOffsetsBeginAtTheCodesAndMoveThemByOne) {
  LearnStep step = one_step(5e-2);
  step.weights = Weights::kRounded;
  step.rule = LearnStep::Rule::kAdam;
  step.steps = 16;
  step.rates = {{"*.weight_offset", 5e-2}};
  step.rank = 2;
  const std::vector<Step> rounded = {RoundStep{}};
  const std::vector<BlockState> states = learned(step, rounded);
  EXPECT_LT(stages.at(0).loss_after, stages.at(0).loss_before);
  for (size_t i = 0; i < 2; ++i) {
    OpenBlock start = open(1 + i);
    run(start, rounded);
    Tensor changed = at::zeros({}, at::kLong);
    for (const auto& [name, weight] : start.state().weights) {
      const Tensor moved =
          (states[i].weights.at(name).codes->codes.to(at::kLong) - weight.codes->codes.to(at::kLong)).abs();
      EXPECT_LE(moved.max().item<int64_t>(), 1) << name;
      changed += moved.sum();
    }
    EXPECT_GT(changed.item<int64_t>(), 0);
    const BlockTask given = task();
    Candidate candidate(step, start, given);
    for (const Parameter& parameter : candidate.parameters()) {
      ASSERT_EQ(parameter.leaves.size(), 2U);
      EXPECT_EQ(parameter.leaves[0].size(1), 2);
      EXPECT_EQ(parameter.leaves[1].size(0), 2);
    }
    test::expect_same_state(candidate.result(), start.state());
  }
}

TEST_P(LearnTogether, AShareOfTheInputsIsRounded) {
  LearnStep step = one_step(1e-2);
  step.weights = Weights::kStraightThrough;
  step.rates = {{"*.weight_clip", 1e-2}};
  const auto rounded = [&](double share) {
    step.rounded_share = share;
    OpenBlock block = open(1);
    const BlockTask given = task();
    Candidate candidate(step, block, given);
    return candidate.build(Candidate::Phase::kMonitoring);
  };
  const DecoderLayer exact = test::tiny_layer(shape, 1), whole = rounded(1), half = rounded(0.5), none = rounded(0);
  exact.for_each_linear([&](const std::string& name, const Linear& linear) {
    const int64_t n = linear.weight.size(1), first = n / 2;
    const auto same = [&](const DecoderLayer& a, const Tensor& b, int64_t begin, int64_t count) {
      return at::equal(a.linear(name).weight.narrow(1, begin, count), b.narrow(1, begin, count));
    };
    EXPECT_TRUE(same(half, whole.linear(name).weight, 0, first)) << name;
    EXPECT_TRUE(same(half, linear.weight, first, n - first)) << name;
    EXPECT_TRUE(same(none, linear.weight, 0, n)) << name;
    EXPECT_FALSE(same(whole, linear.weight, 0, first)) << name;
  });
}

INSTANTIATE_TEST_SUITE_P(Shapes, LearnTogether, testing::ValuesIn(test::llama_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
