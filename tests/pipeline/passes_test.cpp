// Recipes of several passes over tiny checkpoints.
#include <gtest/gtest.h>

#include <numeric>

#include "baseq/pipeline/job.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TinyShape;

json steps_of(const char* text) { return json::parse(text); }

const char* const kRounded = R"([
  {"step": "transform", "kind": "hadamard", "at": ["residual"]},
  {"step": "transform", "kind": "scale", "at": ["value", "down"]},
  {"step": "transform", "kind": "matrix", "at": ["value"]},
  {"step": "transform", "kind": "hadamard", "at": ["value", "query_key", "down"]},
  {"step": "points", "at": ["o", "down"], "clip": 0.9, "shift": "zero"},
  {"step": "learn", "name": "transforms", "weights": "straight_through", "epochs": 1, "final_rate": 3e-5,
   "rates": {"value.matrix": 0.003, "*.scale": 0.003, "*.clip": 0.03, "*.shift": 0.002}},
  {"step": "points", "at": ["qkv", "gate_up", "k_cache", "v_cache"], "shift": "mean"},
  {"step": "round", "method": "gptq", "compensate_streams": true, "low_rank": {"rank": 2}}])";
const char* const kRoundedAgain = R"([
  {"step": "round", "method": "gptq", "compensate_streams": true, "low_rank": {"rank": 2}}])";
const char* const kActivations = R"([
  {"step": "learn", "name": "activations", "weights": "rounded", "epochs": 4, "final_rate": 3e-6, "stream": "quantized",
   "rates": {"*.clip": 0.03, "*.shift": 0.002, "*.gain": 0.003}}])";

class Passes : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  Passes() : TinyRun(GetParam()) {}

  static Recipe recipe(const std::vector<json>& passes) {
    json text = json::parse(R"({"grids": {"weights": {}, "input_activations": {}, "kv_cache": {}},
                                "calibration": {"num_samples": 4, "seq_len": 16}, "passes": []})");
    for (const json& steps : passes) text["passes"].push_back({{"steps", steps}});
    return Recipe::from_json(text, "recipe");
  }
};

TEST_P(Passes, ASecondOneThatDoesNothingNewGivesTheSameBytes) {
  run(recipe({steps_of(kRounded)}), "one");
  for (const json& second : {json::array(), steps_of(kRoundedAgain)}) {
    run(recipe({steps_of(kRounded), second}), "two", {.output = {.force = true}});
    expect_same_files("one", "two", /*same_recipe=*/false);
  }
}

TEST_P(Passes, ASecondOneLearnsOnTheStreamThatTheFirstLeft) {
  std::vector<double> before, after;
  const ProgressFn progress = [&](const ProgressEvent& event) {
    const auto* stage = std::get_if<StageLearned>(&event);
    if (!stage || stage->stage != "activations") return;
    EXPECT_EQ(stage->block, int64_t(before.size()));
    before.push_back(stage->loss_before);
    after.push_back(stage->loss_after);
  };
  run(recipe({steps_of(kRounded), steps_of(kActivations)}), "out", {}, progress);
  ASSERT_EQ(int64_t(before.size()), shape.num_layers);
  for (size_t i = 0; i < before.size(); ++i) EXPECT_LE(after[i], before[i]) << i;
  EXPECT_LT(std::accumulate(after.begin(), after.end(), 0.0), std::accumulate(before.begin(), before.end(), 0.0));
  EXPECT_TRUE(logits("out").isfinite().all().item<bool>());
  EXPECT_LT(test::relative_error(logits("out"), logits("in")), 0.75);
}

TEST_P(Passes, AnInterruptedRunContinuesToTheSameBytes) {
  const Recipe two = recipe({steps_of(kRounded), steps_of(kActivations)});
  run(two, "whole");
  const int64_t steps = run_until(two, "counted", -1);
  forget("counted");
  for (const int64_t part : {1, 3, 5, 7}) {
    SCOPED_TRACE(part);
    const int64_t stop = steps * part / 8;
    EXPECT_EQ(run_until(two, "resumed", stop), stop + 1);
    run_until(two, "resumed", steps / 9);
    run_until(two, "resumed", -1);
    expect_same_run("whole", "resumed");
    forget("resumed");
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Passes, testing::ValuesIn(test::llama_shapes()), test::shape_name);

}  // namespace
}  // namespace baseq
