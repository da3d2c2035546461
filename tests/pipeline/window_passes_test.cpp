// Passes in windows of several blocks over tiny checkpoints.
#include <gtest/gtest.h>

#include "baseq/pipeline/job.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TinyShape;

const char* const kStart = R"([
  {"step": "transform", "kind": "hadamard", "at": ["residual", "value", "query_key", "down"]},
  {"step": "points", "at": ["*"], "clip": 0.9, "shift": "mean"}])";
const char* const kLearned = R"(
  {"step": "learn", "name": "window", "loss": "mse_kl", "weights": "straight_through", "stream": "quantized",
   "epochs": 3, "num_monitored": 2, "rank": 2,
   "rates": {"*.clip": 0.03, "*.shift": 0.002, "*.weight_clip": 0.05, "*.weight_lora": 0.01}})";
const char* const kRound = R"({"step": "round", "method": "rtn", "clip": "none"})";
const char* const kOfCodes = R"(
  {"step": "learn", "name": "codes", "stream": "quantized", "epochs": 2, "rank": 2, "products": "float32",
   "rates": {"*.weight_offset": 0.05, "*.weight_scale": 0.01}})";

std::vector<TinyShape> six_blocks() {
  std::vector<TinyShape> shapes = test::llama_shapes();
  shapes.resize(2);
  for (TinyShape& shape : shapes) shape.num_layers = 6;
  return shapes;
}

class WindowPasses : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  WindowPasses() : TinyRun(GetParam()) {}
  explicit WindowPasses(const TinyShape& tiny) : TinyRun(tiny) {}

  static json steps(const std::vector<const char*>& texts) {
    json list = json::array();
    for (const char* text : texts) list.push_back(json::parse(text));
    return list;
  }
  static json start() { return {{"steps", json::parse(kStart)}}; }
  static json in_windows(int64_t window, int64_t stride, json list) {
    return {{"window", window}, {"stride", stride}, {"steps", std::move(list)}};
  }
  static json slider(json list) { return {{"windows", "slider"}, {"steps", std::move(list)}}; }
  static Recipe recipe(const std::vector<json>& passes) {
    json text = json::parse(R"({"grids": {"weights": {"num_bits": 3}, "input_activations": {}, "kv_cache": {}},
                                "token_weights": "inverse_energy",
                                "calibration": {"num_samples": 4, "seq_len": 16}})");
    text["passes"] = passes;
    return Recipe::from_json(text, "recipe");
  }
  /// Windows that overlap, one after the other, of the slider; straight through, and of codes.
  static std::vector<Recipe> recipes() {
    return {recipe({start(), in_windows(2, 1, steps({kLearned, kRound}))}),
            recipe({start(), in_windows(3, 2, steps({kLearned})), slider(steps({kLearned, kRound}))}),
            recipe({start(), {{"steps", steps({kRound})}}, in_windows(3, 3, steps({kOfCodes}))})};
  }
};

TEST_P(WindowPasses, WithoutLearningAreTheLoopOverBlocks) {
  json skipped = json::parse(kLearned);
  skipped["epochs"] = 0;
  skipped["rates"] = {{"*.clip", 0.03}};
  skipped.erase("rank");
  const json round = json::parse(R"({"step": "round", "method": "gptq", "compensate_streams": true})");
  run(recipe({start(), {{"steps", json::array({round})}}}), "loop");
  for (const json& pass : {in_windows(1, 1, {round}), in_windows(2, 1, {skipped, round}),
                           in_windows(3, 2, {skipped, round}), slider({skipped, round})}) {
    SCOPED_TRACE(pass.dump());
    run(recipe({start(), pass}), "windows", {.output = {.force = true}});
    expect_same_files("loop", "windows", /*same_recipe=*/false);
  }
}

TEST_P(WindowPasses, LowerTheLossAfterTheLastBlockOfEach) {
  for (const Recipe& recipe : recipes()) {
    SCOPED_TRACE(recipe.to_json().dump());
    std::vector<StageLearned> stages;
    run(recipe, "out", {.output = {.force = true}}, [&](const ProgressEvent& event) {
      if (const auto* stage = std::get_if<StageLearned>(&event)) stages.push_back(*stage);
    });
    double before = 0, after = 0;
    for (const StageLearned& stage : stages) {
      EXPECT_LE(stage.loss_after, stage.loss_before);
      before += stage.loss_before, after += stage.loss_after;
    }
    EXPECT_LT(after, before);
    EXPECT_TRUE(logits("out").isfinite().all().item<bool>());
  }
}

TEST_P(WindowPasses, WhereNoEpochIsBetterTheBytesAreThoseWithoutThem) {
  const auto tuned = [&](int64_t epochs) {
    json step = json::parse(kLearned);
    step.erase("rank");
    step["epochs"] = epochs;
    step["rates"] = {{"*.shift", 10}};
    return recipe({start(), in_windows(2, 1, json::array({step, json::parse(kRound)}))});
  };
  run(tuned(2), "far");
  run(tuned(0), "none");
  expect_same_files("none", "far", /*same_recipe=*/false);
}

TEST_P(WindowPasses, AnInterruptedRunContinuesToTheSameBytes) {
  for (const Recipe& recipe : recipes()) {
    SCOPED_TRACE(recipe.to_json().dump());
    run(recipe, "whole");
    const int64_t steps = run_until(recipe, "counted", -1);
    forget("counted");
    for (const int64_t part : {4, 9, 13}) {
      SCOPED_TRACE(part);
      const int64_t stop = steps * part / 16;
      EXPECT_EQ(run_until(recipe, "resumed", stop), stop + 1);
      run_until(recipe, "resumed", steps / 9);
      run_until(recipe, "resumed", -1);
      expect_same_run("whole", "resumed");
      forget("resumed");
    }
    std::filesystem::remove_all(directory / "whole");
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, WindowPasses, testing::ValuesIn(six_blocks()), test::shape_name);

/// All windows are of this block.
class OneBlock : public WindowPasses {
 protected:
  OneBlock() : WindowPasses(TinyShape{.num_layers = 1}) {}
};

TEST_F(OneBlock, LearnsAsInTheLoopOverBlocks) {
  for (const char* learned : {kLearned, kOfCodes}) {
    std::vector<json> before = {start()};
    json list = steps({learned, kRound});
    if (learned == kOfCodes) {
      before.push_back({{"steps", steps({kRound})}});
      list = steps({learned});
    }
    const auto with = [&](const json& last) {
      std::vector<json> passes = before;
      passes.push_back(last);
      return recipe(passes);
    };
    run(with({{"steps", list}}), "loop", {.output = {.force = true}});
    for (const json& pass : {in_windows(2, 1, list), slider(list)}) {
      run(with(pass), "windows", {.output = {.force = true}});
      expect_same_files("loop", "windows", /*same_recipe=*/false);
    }
  }
}

}  // namespace
}  // namespace baseq
