// Passes over the model in runs over tiny checkpoints.
#include "pipeline/model_step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "pipeline/turns.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TinyShape;

const char* const kBlocks = R"([
  {"step": "transform", "kind": "hadamard", "at": ["residual", "value", "query_key", "down"]},
  {"step": "points", "at": ["*"], "clip": 0.9, "shift": "mean"},
  {"step": "round", "method": "gptq"}])";
const char* const kTuned = R"([
  {"step": "learn", "name": "tuning", "loss": "kl", "epochs": 4, "num_monitored": 1, "products": "float32",
   "rates": {"*.clip": 0.01, "*.shift": 0.002, "*.gain": 0.002, "*.norm": 0.002, "*.weight_scale": 0.002}}])";

class OverTheModel : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  OverTheModel() : TinyRun(GetParam()) {}

  static json pass(const json& steps, const char* over) { return {{"over", over}, {"steps", steps}}; }
  static Recipe recipe(const std::vector<json>& passes) {
    json text = json::parse(R"({"grids": {"weights": {}, "input_activations": {}, "kv_cache": {}},
                                "calibration": {"num_samples": 4, "seq_len": 16}})");
    text["passes"] = passes;
    return Recipe::from_json(text, "recipe");
  }
  json blocks = pass(json::parse(kBlocks), "blocks"), tuned = pass(json::parse(kTuned), "model");
};

TEST_P(OverTheModel, TheDivergenceFallsAndTheRunTellsOfIt) {
  std::vector<StageLearned> stages;
  std::vector<EpochLearned> epochs;
  const ProgressFn progress = [&](const ProgressEvent& event) {
    if (const auto* stage = std::get_if<StageLearned>(&event)) stages.push_back(*stage);
    if (const auto* epoch = std::get_if<EpochLearned>(&event)) epochs.push_back(*epoch);
  };
  for (const char* loss : {"kl", "kl_top", "ce"}) {
    SCOPED_TRACE(loss);
    stages.clear(), epochs.clear();
    tuned["steps"][0]["loss"] = loss;
    run(recipe({blocks, tuned}), "out", {.output = {.force = true}}, progress);
    ASSERT_EQ(stages.size(), 1U);
    EXPECT_EQ(stages[0].block, kWholeModel);
    ASSERT_EQ(epochs.size(), 4U);
    EXPECT_EQ(epochs[0].block, kWholeModel);
    EXPECT_LE(stages[0].loss_after, stages[0].loss_before);
    EXPECT_TRUE(logits("out").isfinite().all().item<bool>());
  }
  const auto log = test::log_without_times(directory / "out");
  const auto told = std::ranges::count_if(log, [](const json& line) { return line.value("block", json()) == "model"; });
  EXPECT_EQ(told, 7);  // begin, four epochs, the stage, end
  EXPECT_EQ(read_run_log(directory / "out" / kRunLogFile).model.epochs.size(), 4U);
}

/// On the windows that it learns from; what it does to others a model of two random blocks cannot show.
TEST_P(OverTheModel, WhatItLearnsIsInTheCheckpoint) {
  run(recipe({blocks}), "rounded");
  tuned["steps"][0]["epochs"] = 10;
  run(recipe({blocks, tuned}), "tuned");
  const auto divergence = [&](const char* name) {
    const auto log_p = [&](const char* of) {
      return Model(Checkpoint(directory / of)).logits(windows).to(at::kDouble).log_softmax(-1);
    };
    return (log_p("in").exp() * (log_p("in") - log_p(name))).sum(-1).mean().item<double>();
  };
  EXPECT_LT(divergence("tuned"), divergence("rounded"));
}

TEST_P(OverTheModel, WhereNoEpochIsBetterTheBytesAreThoseWithoutIt) {
  run(recipe({blocks}), "rounded");
  json& step = tuned["steps"][0];
  step["rates"] = {{"*.shift", 10}, {"*.gain", 10}};
  run(recipe({blocks, tuned}), "far");
  test::TinyRun::expect_same_files("rounded", "far", /*same_recipe=*/false);
  step["epochs"] = 0;
  run(recipe({blocks, tuned}), "none");
  test::TinyRun::expect_same_files("rounded", "none", /*same_recipe=*/false);
}

TEST_P(OverTheModel, ABlockIsRoundedAnewAfterIt) {
  const json round = pass(json::parse(R"([{"step": "round", "method": "gptq"}])"), "blocks");
  run(recipe({blocks, tuned, round}), "out");
  EXPECT_TRUE(logits("out").isfinite().all().item<bool>());
  EXPECT_LT(test::relative_error(logits("out"), logits("in")), 1);
}

TEST_P(OverTheModel, AnInterruptedRunContinuesToTheSameBytes) {
  const Recipe tuning = recipe({blocks, tuned});
  run(tuning, "whole");
  const int64_t steps = run_until(tuning, "counted", -1);
  forget("counted");
  bool inside = false;
  for (const int64_t part : {2, 5, 7, 9, 15}) {
    SCOPED_TRACE(part);
    const int64_t stop = steps * part / 16;
    EXPECT_EQ(run_until(tuning, "resumed", stop), stop + 1);
    inside = inside || message.find("a pass over the model") != std::string::npos;
    run_until(tuning, "resumed", steps / 9);
    run_until(tuning, "resumed", -1);
    expect_same_run("whole", "resumed");
    forget("resumed");
  }
  EXPECT_TRUE(inside);
}

TEST_P(OverTheModel, AFinishedOneIsNotDoneAgain) {
  const Recipe tuning = recipe({blocks, tuned});
  run(tuning, "whole");
  bool finished = false;
  const auto stop_after = [&](const ProgressEvent& event) {
    const auto* end = std::get_if<BlockFinished>(&event);
    finished = finished || (end && end->block == kWholeModel);
  };
  EXPECT_THROW(run(tuning, "resumed", {.work_directory = directory / "work", .should_stop = [&] { return finished; }},
                   stop_after),
               Interrupted);
  run(tuning, "resumed", {.work_directory = directory / "work"}, [](const ProgressEvent& event) {
    EXPECT_FALSE(std::holds_alternative<EpochLearned>(event));
    EXPECT_FALSE(std::holds_alternative<LinearRounded>(event));
  });
  expect_same_run("whole", "resumed");
}

INSTANTIATE_TEST_SUITE_P(Shapes, OverTheModel, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(ModelStep, ALossThatIsNotFiniteEndsTheStepAndNotTheRun) {
  const TinyShape shape;
  const ModelConfig config = test::tiny_model_config(shape);
  Grids grids;
  BlockInputs inputs{.quantized = test::random_normal({3, 8, shape.hidden_size}, 1, at::kFloat),
                     .rope = test::tiny_rope(shape, 8, at::kFloat)};
  ModelState state{std::vector<BlockState>(2)};
  std::vector<std::string> warnings;
  const auto head = [&](double factor) {
    return Head{.norm = {.weight = at::ones({shape.hidden_size})},
                .weight = factor * test::random_normal({shape.vocab_size, shape.hidden_size}, 3, at::kFloat)};
  };
  const ModelTask task{
      .config = config,
      .grids = grids,
      .inputs = inputs,
      .target = test::random_normal({3, 8, shape.hidden_size}, 2, at::kFloat),
      .windows = test::random_ids({3, 8}, shape.vocab_size, 4),
      .heads =
          [&](at::ScalarType) {
            return Heads{head(INFINITY), head(1)};
          },
      .read_original = [&](int64_t block) { return test::tiny_layer(shape, 1 + uint64_t(block), at::kFloat); },
      .report =
          [&](const ProgressEvent& event) {
            if (const auto* warning = std::get_if<Warning>(&event)) warnings.push_back(warning->message);
          }};
  const LearnStep step{.name = "tuning",
                       .loss = LearnStep::Loss::kKl,
                       .weights = LearnStep::Weights::kExact,
                       .rates = {{"*.norm", 0.1}},
                       .products = at::kFloat};
  apply(step, state, task);
  ASSERT_EQ(warnings.size(), 1U);
  EXPECT_NE(warnings[0].find("the model, tuning: the loss became NaN"), std::string::npos) << warnings[0];
  for (const BlockState& block : state.blocks) EXPECT_TRUE(block.norms.empty());
  EXPECT_FALSE(state.final_norm.defined());
}

TEST(RunTurns, GoThroughBlocksOrTheModelPassByPass) {
  Pass whole;
  whole.over = Pass::Over::kModel;
  const std::vector<Pass> passes = passes_with_blocks_last({Pass{}, whole});
  ASSERT_EQ(passes.size(), 3U);
  EXPECT_TRUE(passes[2].steps.empty());
  EXPECT_EQ(passes_with_blocks_last({Pass{}, whole, Pass{}}).size(), 3U);
  const Turns turns(passes, 2);
  ASSERT_EQ(turns.size(), 5);
  const std::vector<std::pair<int64_t, int64_t>> expected = {{0, 0}, {0, 1}, {1, kWholeModel}, {2, 0}, {2, 1}};
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(std::make_pair(turns[i].pass, turns[i].block), expected[size_t(i)]) << i;
    EXPECT_EQ(turns.starts_pass(i), i != 1 && i != 4) << i;
    EXPECT_EQ(turns.first_of_pass(i), i < 2 ? 0 : i == 2 ? 2 : 3) << i;
    EXPECT_EQ(turns.in_last_pass(i), i > 2) << i;
  }
  EXPECT_TRUE(turns.starts_pass(5));
}

}  // namespace
}  // namespace baseq
