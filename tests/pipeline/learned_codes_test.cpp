#include "pipeline/learned_codes.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "block_test.h"
#include "pipeline/candidate.h"
#include "quant/cells.h"

namespace baseq {
namespace {

using Rates = std::map<std::string, double>;
using Phase = Candidate::Phase;

/// A block whose rounded weights are learned.
class LearnedRounding : public test::BlockTest {
 protected:
  LearnedRounding() { grids = {.weights = QuantSpec{.num_bits = 3}}; }

  static LearnStep step_of(const Rates& rates) {
    return {.name = "rounding",
            .steps = 24,
            .rule = LearnStep::Rule::kSign,
            .rates = rates,
            .schedule = LearnStep::Schedule::kLinear,
            .products = at::kFloat};
  }
  OpenBlock rounded(RoundStep::Method method = RoundStep::Method::kNearest) const {
    OpenBlock block = open_block();
    run(block, {RoundStep{.method = method}});
    return block;
  }
  void every_grid(const std::function<void()>& test) {
    for (const bool symmetric : {true, false}) {
      for (const at::ScalarType scales : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(std::string(symmetric ? "symmetric, " : "asymmetric, ") + c10::toString(scales));
        grids.weights = QuantSpec{.num_bits = 3, .symmetric = symmetric, .scale_dtype = scales};
        test();
      }
    }
  }
  /// What can be learned about the codes.
  Rates all_rates(double rate) const {
    Rates rates = {{"*.weight_offset", rate}, {"*.weight_value", rate}, {"*.weight_scale", rate}};
    if (!grids.weights->symmetric) rates["*.weight_zero_point"] = rate;
    return rates;
  }
};

TEST_P(LearnedRounding, BeginsAtTheBitsOfTheRoundStep) {
  every_grid([&] {
    for (const auto method : {RoundStep::Method::kNearest, RoundStep::Method::kGptq}) {
      OpenBlock block = rounded(method);
      const BlockState before = block.state();
      const DecoderLayer layer_before = block.layer();
      const LearnStep step = step_of(all_rates(1));
      const BlockTask given = task();
      Candidate candidate(step, block, given);
      const c10::NoGradGuard no_grad;
      const DecoderLayer built = candidate.build(Phase::kMonitoring);
      layer_before.for_each_linear([&](const std::string& name, const Linear& linear) {
        EXPECT_TRUE(at::equal(built.linear(name).weight, linear.weight)) << name;
      });
      test::expect_same_state(candidate.result(), before);
      for (const auto& [name, weight] : candidate.result().weights) EXPECT_FALSE(weight.learned.defined()) << name;
    }
  });
}

TEST_P(LearnedRounding, WhatItBuildsIsWhatItsResultRealizes) {
  every_grid([&] {
    OpenBlock block = rounded(RoundStep::Method::kGptq);
    const LearnStep step = step_of(all_rates(1));
    const BlockTask given = task();
    Candidate candidate(step, block, given);
    const c10::NoGradGuard no_grad;
    uint64_t seed = 60;
    for (const Parameter& parameter : candidate.parameters()) {
      const double distance = parameter.name.ends_with("weight_scale") ? 0.05 : 0.6;
      for (const Tensor& leaf : parameter.leaves)
        leaf.add_(test::random_normal(leaf.sizes(), seed++, at::kFloat), distance);
      if (parameter.project) parameter.project();
    }
    const BlockState result = candidate.result();
    EXPECT_FALSE(
        at::equal(result.weights.at("mlp.up_proj").codes->codes, block.state().weights.at("mlp.up_proj").codes->codes));
    const DecoderLayer built = candidate.build(Phase::kMonitoring);
    realize(layer, result, place).for_each_linear([&](const std::string& name, const Linear& linear) {
      EXPECT_TRUE(at::equal(built.linear(name).weight, linear.weight)) << name;
    });
    for (const auto& [name, tensor] : state_tensors(result)) EXPECT_FALSE(tensor.requires_grad()) << name;
  });
}

TEST_P(LearnedRounding, LowersTheLossAndNeverEndsAboveItsStart) {
  every_grid([&] {
    for (const auto& [what, rate] :
         Rates{{"*.weight_offset", 0.02}, {"*.weight_value", 0.02}, {"*.weight_scale", 0.002}}) {
      for (const double faster : {1.0, 500.0}) {
        SCOPED_TRACE(what + ", times " + std::to_string(faster));
        OpenBlock block = rounded();
        const double before = loss_of(block.layer());
        run(block, {step_of({{what, faster * rate}})});
        EXPECT_LE(stages.back().loss_after, stages.back().loss_before);
        EXPECT_NEAR(stages.back().loss_before / before, 1, 1e-4);
        EXPECT_NEAR(stages.back().loss_after / loss_of(block.layer()), 1, 1e-4);
        if (faster == 1) {
          EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
        }
      }
    }
  });
}

TEST_P(LearnedRounding, AStepThatLearnsNothingChangesNothing) {
  for (const auto method : {RoundStep::Method::kNearest, RoundStep::Method::kGptq}) {
    OpenBlock block = rounded(method);
    const BlockState before = block.state();
    run(block, {step_of({{"*.weight_offset", 0}, {"*.weight_scale", 0}})});
    test::expect_same_state(block.state(), before);
    EXPECT_NE(warnings.back().find("no epoch lowered the loss"), std::string::npos);
  }
}

TEST_P(LearnedRounding, AnOffsetMovesACodeByOneAtMost) {
  for (const auto method : {RoundStep::Method::kNearest, RoundStep::Method::kGptq}) {
    OpenBlock block = rounded(method);
    const LearnStep step = step_of({{"*.weight_offset", 1}});
    const BlockTask given = task();
    Candidate candidate(step, block, given);
    const c10::NoGradGuard no_grad;
    uint64_t seed = 80;
    for (const Parameter& parameter : candidate.parameters()) {
      const Tensor& offset = parameter.leaves.at(0);
      offset.add_(test::random_normal(offset.sizes(), seed++, at::kFloat), 3);
      parameter.project();
      EXPECT_EQ(offset.abs().max().item<double>(), 0.5);
    }
    int64_t moved = 0;
    for (const auto& [name, weight] : candidate.result().weights) {
      const QuantizedWeight& before = *block.state().weights.at(name).codes;
      const Tensor distance = (weight.codes->codes.to(at::kInt) - before.codes.to(at::kInt)).abs();
      EXPECT_LE(distance.max().item<int64_t>(), 1) << name;
      moved += distance.sum().item<int64_t>();
      EXPECT_TRUE(at::equal(weight.codes->qparams.scale, before.qparams.scale)) << name;
    }
    EXPECT_GT(moved, 0);
  }
}

TEST_P(LearnedRounding, ScalesAloneLeaveTheCodes) {
  OpenBlock block = rounded();
  const BlockState before = block.state();
  run(block, {step_of({{"*.weight_scale", 0.002}})});
  for (const auto& [name, weight] : block.state().weights) {
    EXPECT_TRUE(at::equal(weight.codes->codes, before.weights.at(name).codes->codes)) << name;
    EXPECT_FALSE(at::equal(weight.codes->qparams.scale, before.weights.at(name).codes->qparams.scale)) << name;
  }
}

TEST_P(LearnedRounding, GradientsOfOffsetsAreThoseOfTheWeightsInStepsInsideTheGrid) {
  const std::string name = "mlp.up_proj";
  for (const char* what : {".weight_offset", ".weight_value"}) {
    OpenBlock block = rounded();
    const LearnStep step = step_of({{name + what, 1}});
    const BlockTask given = task();
    Candidate candidate(step, block, given);
    const auto loss = [&](const DecoderLayer& of) { return (of.forward(x, inputs.rope) - target).square().mean(); };
    const at::AutoGradMode with_grad(true);
    const DecoderLayer built = candidate.build(Phase::kLearning);
    loss(built).backward();
    DecoderLayer explicit_one = built.detach();
    Tensor weight = explicit_one.linear(name).weight.clone().requires_grad_(true);
    explicit_one.linear(name).weight = weight;
    loss(explicit_one).backward();
    const QuantizedWeight& codes = *block.state().weights.at(name).codes;
    const Tensor exact = layer.linear(name).weight;
    const Tensor position = exact / codes.qparams.scale;
    const Tensor inside = position.ge(-4).logical_and(position.le(3)).to(at::kFloat);
    const Tensor expected = in_units_of(weight.grad(), codes.qparams.scale, codes.spec) * inside;
    EXPECT_LT(test::relative_error(candidate.parameters()[0].leaves[0].grad() * inside, expected), 1e-5) << what;
    EXPECT_LT(inside.mean().item<double>(), 1) << "nothing is clipped";
  }
}

TEST_P(LearnedRounding, GradientsOfScalesAreDifferenceQuotients) {
  for (const bool symmetric : {true, false}) {
    grids.weights->symmetric = symmetric;
    OpenBlock block = rounded();
    const LearnStep step = step_of({{"mlp.down_proj.weight_scale", 1}});
    const BlockTask given = task();
    Candidate candidate(step, block, given);
    const Tensor leaf = candidate.parameters().at(0).leaves.at(0);
    const Tensor direction = test::random_normal(leaf.sizes(), 5, at::kFloat);
    const auto observed = [&] {
      const Tensor output = candidate.build(Phase::kLearning).forward(x, inputs.rope);
      return (output * test::random_normal(output.sizes(), 90, at::kFloat)).sum(at::kDouble);
    };
    const auto moved = [&](double by) {
      const c10::NoGradGuard no_grad;
      leaf.add_(direction, by);
      const double value = observed().item<double>();
      leaf.add_(direction, -by);
      return value;
    };
    constexpr double kDistance = 0.01;
    const double expected = (moved(kDistance) - moved(-kDistance)) / (2 * kDistance);
    const at::AutoGradMode with_grad(true);
    observed().backward();
    EXPECT_NEAR((leaf.grad() * direction).sum().item<double>() / expected, 1, 1e-2);
  }
}

TEST_P(LearnedRounding, ACorrectionStaysNextToTheLearnedCodes) {
  OpenBlock block = open_block();
  run(block, {RoundStep{.low_rank = LowRankOptions{.method = LowRankOptions::Method::kSvd, .rank = 2}}});
  const BlockState before = block.state();
  run(block, {step_of({{"*.weight_offset", 0.02}})});
  EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
  EXPECT_NEAR(stages.back().loss_after / loss_of(block.layer()), 1, 1e-4);
  for (const auto& [name, weight] : block.state().weights) {
    EXPECT_TRUE(at::equal(weight.low_rank.A, before.weights.at(name).low_rank.A)) << name;
  }
}

TEST_P(LearnedRounding, ClipsOfAnAsymmetricGridHaveTwoEnds) {
  grids.weights = QuantSpec{.num_bits = 3, .symmetric = false};
  rounding.mse_clip = false;
  RoundStep nearest{};
  nearest.gptq.mse_clip = false;
  LearnStep step = step_of({{"*.weight_clip", 0.2}});
  step.weights = LearnStep::Weights::kStraightThrough;
  step.rule = LearnStep::Rule::kAdam;
  OpenBlock block = open_block();
  run(block, {step, nearest});
  EXPECT_LT(stages.back().loss_after, stages.back().loss_before);
  EXPECT_NEAR(stages.back().loss_after / loss_of(block.layer()), 1, 1e-4);
  for (const auto& [name, weight] : block.state().weights) {
    ASSERT_EQ(weight.clip.size(-1), 2) << name;
    EXPECT_FALSE(at::equal(weight.clip.select(-1, 0), weight.clip.select(-1, 1))) << name;
  }
  // The journal keeps them.
  test::expect_same_state(state_from_tensors(state_tensors(block.state()), grids, at::kCPU), block.state());
}

INSTANTIATE_TEST_SUITE_P(Shapes, LearnedRounding, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
