#include "pipeline/block_optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "../tiny_model.h"

namespace baseq {
namespace {

/// mean_i |x_i w - y_i|^2 with y_i = x_i times a known w.
struct Regression {
  static constexpr int64_t kSamples = 16;
  Tensor x = test::random_normal({kSamples, 8, 5}, 1);
  Tensor solution = test::random_normal({5}, 2);
  Tensor y = at::matmul(x, solution);
  Tensor w = at::zeros({5}, at::kDouble).requires_grad_(true);

  Tensor loss(const Tensor& indices) const {
    return (at::matmul(x.index_select(0, indices), w) - y.index_select(0, indices)).square().mean();
  }
  double monitor() const { return loss(at::arange(kSamples, at::kLong)).item<double>(); }
  OptimizeResult run(double learning_rate, const OptimizeOptions& options) {
    return optimize_block([&](const Tensor& indices) { return loss(indices); }, [&] { return monitor(); }, kSamples,
                          {{{w}, learning_rate}}, options);
  }
};

TEST(OptimizeBlock, MinimisesAQuadratic) {
  Regression regression;
  const OptimizeResult result = regression.run(0.05, {.epochs = 60, .batch_size = 4});
  EXPECT_LT(result.loss_after, 1e-4 * result.loss_before);
  EXPECT_LT(test::relative_error(regression.w.detach(), regression.solution), 1e-2);
  EXPECT_EQ(result.losses.size(), 60u * 4u);
  EXPECT_FALSE(result.stopped_at_nonfinite);
}

TEST(OptimizeBlock, ParametersHoldTheStateThatWasMeasuredBest) {
  for (const double learning_rate : {1e-3, 0.3, 3.0}) {
    Regression regression;
    const OptimizeResult result = regression.run(learning_rate, {.epochs = 7, .batch_size = 3, .seed = 5});
    EXPECT_LE(result.loss_after, result.loss_before) << learning_rate;
    EXPECT_DOUBLE_EQ(regression.monitor(), result.loss_after) << learning_rate;
  }
}

TEST(OptimizeBlock, DivergingLearningKeepsTheStart) {
  Regression regression;
  const OptimizeResult result = regression.run(1e6, {.epochs = 3, .batch_size = 16, .final_learning_rate = 1e6});
  EXPECT_EQ(result.best_epoch, 0);
  EXPECT_EQ(result.loss_after, result.loss_before);
  EXPECT_TRUE(at::equal(regression.w.detach(), at::zeros({5}, at::kDouble)));
}

TEST(OptimizeBlock, NonfiniteLossEndsLearningAtTheBestState) {
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Regression regression;
    int64_t calls = 0;
    const OptimizeResult result = optimize_block(
        [&](const Tensor& indices) {
          const Tensor loss = regression.loss(indices);
          return ++calls > 40 ? loss * poison : loss;
        },
        [&] { return regression.monitor(); }, Regression::kSamples, {{{regression.w}, 0.02}},
        {.epochs = 10, .batch_size = 1});
    EXPECT_TRUE(result.stopped_at_nonfinite);
    EXPECT_EQ(result.losses.size(), 41u);
    EXPECT_EQ(result.best_epoch, 2);
    EXPECT_LT(result.loss_after, result.loss_before);
    EXPECT_DOUBLE_EQ(regression.monitor(), result.loss_after);
  }
}

TEST(OptimizeBlock, NonfiniteMonitorIsNeverBetter) {
  Regression regression;
  int64_t calls = 0;
  const OptimizeResult result =
      optimize_block([&](const Tensor& indices) { return regression.loss(indices); },
                     [&] { return calls++ == 0 ? 1.0 : std::numeric_limits<double>::quiet_NaN(); },
                     Regression::kSamples, {{{regression.w}, 0.02}}, {.epochs = 3});
  EXPECT_EQ(result.best_epoch, 0);
  EXPECT_EQ(result.loss_after, 1.0);
  EXPECT_TRUE(at::equal(regression.w.detach(), at::zeros({5}, at::kDouble)));
}

TEST(OptimizeBlock, SameSeedSameBytesOtherSeedOtherOrder) {
  const auto run = [](uint64_t seed) {
    Regression regression;
    const auto losses = regression.run(0.01, {.epochs = 2, .seed = seed}).losses;
    return std::pair{losses, regression.w.detach()};
  };
  const auto [losses, w] = run(3);
  const auto [again, w_again] = run(3);
  const auto [other, w_other] = run(4);
  EXPECT_EQ(losses, again);
  EXPECT_TRUE(at::equal(w, w_again));
  EXPECT_NE(losses, other);
}

TEST(OptimizeBlock, VisitsEverySampleOnceAnEpoch) {
  Regression regression;
  std::vector<int64_t> visits(Regression::kSamples, 0);
  optimize_block(
      [&](const Tensor& indices) {
        for (int64_t i = 0; i < indices.numel(); ++i) ++visits[size_t(indices[i].item<int64_t>())];
        return regression.loss(indices);
      },
      [&] { return regression.monitor(); }, Regression::kSamples, {{{regression.w}, 0.01}},
      {.epochs = 3, .batch_size = 5});
  EXPECT_EQ(visits, std::vector<int64_t>(Regression::kSamples, 3));
}

TEST(OptimizeBlock, LearnsUnderANoGradGuard) {
  const c10::NoGradGuard no_grad;
  Regression regression;
  const OptimizeResult result = regression.run(0.05, {.epochs = 20});
  EXPECT_LT(result.loss_after, 0.1 * result.loss_before);
  EXPECT_FALSE(c10::GradMode::is_enabled());
}

TEST(OptimizeBlock, TheSignRuleMovesEachValueByTheRateAgainstTheSignOfItsGradient) {
  const Tensor slopes = at::tensor({3.0, -1e-9, 0.0, -7.0});
  for (const auto schedule : {LearnStep::Schedule::kConstant, LearnStep::Schedule::kLinear}) {
    const Tensor w = at::zeros({4}, at::kDouble).requires_grad_(true);
    // The monitor takes the last state for the best one.
    double monitored = 0;
    optimize_block([&](const Tensor&) { return (w * slopes).sum(); }, [&] { return monitored -= 1; }, 2,
                   {{.parameters = {w}, .learning_rate = 0.25, .rule = LearnStep::Rule::kSign}},
                   {.steps = 4, .schedule = schedule});
    // Linear: 1 + 3/4 + 2/4 + 1/4 of the first rate.
    const double travel = 0.25 * (schedule == LearnStep::Schedule::kConstant ? 4 : 2.5);
    EXPECT_TRUE(at::equal(w.detach(), travel * at::tensor({-1.0, 1.0, 0.0, 1.0}, at::kDouble)));
  }
}

TEST(OptimizeBlock, TheSignRuleKeepsTheBestState) {
  for (const double learning_rate : {0.01, 0.5, 20.0}) {
    Regression regression;
    const OptimizeResult result =
        optimize_block([&](const Tensor& indices) { return regression.loss(indices); },
                       [&] { return regression.monitor(); }, Regression::kSamples,
                       {{.parameters = {regression.w}, .learning_rate = learning_rate, .rule = LearnStep::Rule::kSign}},
                       {.epochs = 8, .batch_size = 4, .schedule = LearnStep::Schedule::kLinear});
    EXPECT_LE(result.loss_after, result.loss_before) << learning_rate;
    EXPECT_DOUBLE_EQ(regression.monitor(), result.loss_after) << learning_rate;
  }
}

TEST(OptimizeBlock, GroupsHaveTheirOwnRules) {
  const auto alone = [](LearnStep::Rule rule) {
    Regression regression;
    optimize_block([&](const Tensor& indices) { return regression.loss(indices); },
                   [&] { return regression.monitor(); }, Regression::kSamples,
                   {{.parameters = {regression.w}, .learning_rate = 0.05, .rule = rule}}, {});
    return regression.w.detach();
  };
  Regression first, second;
  optimize_block([&](const Tensor& indices) { return first.loss(indices) + second.loss(indices); },
                 [&] { return first.monitor() + second.monitor(); }, Regression::kSamples,
                 {{.parameters = {first.w}, .learning_rate = 0.05, .rule = LearnStep::Rule::kSign},
                  {.parameters = {second.w}, .learning_rate = 0.05}},
                 {});
  EXPECT_TRUE(at::equal(first.w.detach(), alone(LearnStep::Rule::kSign)));
  EXPECT_TRUE(at::equal(second.w.detach(), alone(LearnStep::Rule::kAdam)));
}

TEST(OptimizeBlock, StepsCountInsteadOfEpochs) {
  for (const int64_t steps : {1, 4, 6, 11}) {
    Regression regression;
    std::vector<int64_t> epochs;
    OptimizeOptions options{.epochs = 3, .steps = steps, .batch_size = 4};
    options.on_epoch = [&](int64_t epoch, double) { epochs.push_back(epoch); };
    EXPECT_EQ(regression.run(0.05, options).losses.size(), size_t(steps));
    EXPECT_EQ(std::ssize(epochs), options.num_epochs(Regression::kSamples));
    EXPECT_EQ(std::ssize(epochs), (steps + 3) / 4);
  }
  // Whole walks are the same as so many epochs.
  Regression by_epochs, by_steps;
  EXPECT_EQ(by_epochs.run(0.05, {.epochs = 3, .batch_size = 4}).losses,
            by_steps.run(0.05, {.steps = 12, .batch_size = 4}).losses);
  EXPECT_TRUE(at::equal(by_epochs.w, by_steps.w));
}

TEST(OptimizeBlock, ParametersAreProjectedAfterEachStep) {
  Regression regression;
  for (const auto rule : {LearnStep::Rule::kAdam, LearnStep::Rule::kSign}) {
    optimize_block(
        [&](const Tensor& indices) {
          EXPECT_LE(regression.w.abs().max().item<double>(), 0.125);
          return regression.loss(indices);
        },
        [&] { return regression.monitor(); }, Regression::kSamples,
        {{.parameters = {regression.w},
          .learning_rate = 0.1,
          .rule = rule,
          .project = [&] { regression.w.clamp_(-0.125, 0.125); }}},
        {.epochs = 3});
    EXPECT_EQ(regression.w.abs().max().item<double>(), 0.125);
  }
}

TEST(OptimizeBlock, RefusesNothingToDo) {
  Regression regression;
  test::expect_error([&] { regression.run(0.1, {.epochs = 0}); }, {"optimize_block", "positive"});
  test::expect_error([&] { regression.run(0.1, {.batch_size = 0}); }, {"optimize_block", "positive"});
  const auto nothing = [&](const std::vector<ParameterGroup>& groups) {
    optimize_block([&](const Tensor& indices) { return regression.loss(indices); },
                   [&] { return regression.monitor(); }, Regression::kSamples, groups, {});
  };
  test::expect_error([&] { nothing({}); }, {"optimize_block", "no parameters"});
  test::expect_error([&] { nothing({{{}, 0.1}}); }, {"optimize_block", "no parameters"});
}

}  // namespace
}  // namespace baseq
