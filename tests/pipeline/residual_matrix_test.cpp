// Rotations of the whole model that a pass over it learns.
#include <gtest/gtest.h>

#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::TinyShape;

/// SpinQuant in small: activations and cache at 4 bits, weights exact.
const char* const kRotated = R"({
  "grids": {"input_activations": {}, "kv_cache": {}},
  "calibration": {"num_samples": 4, "seq_len": 16},
  "passes": [
    {"steps": [
      {"step": "transform", "kind": "matrix", "at": ["residual"]},
      {"step": "transform", "kind": "hadamard", "at": ["residual", "query_key", "down"]},
      {"step": "points", "at": ["*"]}]},
    {"over": "model", "steps": [
      {"step": "learn", "name": "rotation", "loss": "ce", "weights": "exact", "epochs": 0, "num_monitored": 1,
       "products": "float32", "rates": {"residual.matrix": 0.5}}]}]})";

class ResidualMatrix : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  ResidualMatrix() : TinyRun(GetParam()) {}

  static Recipe rotated(int64_t epochs) {
    json text = json::parse(kRotated);
    text["passes"][1]["steps"][0]["epochs"] = epochs;
    return Recipe::from_json(text, "recipe");
  }
  /// Of the next token in the window that is held out.
  double cross_entropy(const char* name) const {
    const Tensor held_out = windows.narrow(0, 3, 1);
    const Tensor log_p = Model(Checkpoint(directory / name)).logits(held_out).log_softmax(-1)[0].narrow(0, 0, 15);
    return -log_p.gather(1, held_out[0].narrow(0, 1, 15).unsqueeze(1)).mean().item<double>();
  }
};

/// The loss is that of the checkpoint that is written, although the matrix is
/// learned in another basis.
TEST_P(ResidualMatrix, IsLearnedForTheModelThatIsWritten) {
  std::optional<StageLearned> learned;
  run(rotated(0), "start");
  run(rotated(6), "learned", {}, [&](const ProgressEvent& event) {
    if (const auto* stage = std::get_if<StageLearned>(&event)) learned = *stage;
  });
  ASSERT_TRUE(learned);
  EXPECT_NEAR(learned->loss_before / cross_entropy("start"), 1, 0.03);
  EXPECT_NEAR(learned->loss_after / cross_entropy("learned"), 1, 0.03);
  EXPECT_LE(learned->loss_after, learned->loss_before);
}

TEST_P(ResidualMatrix, KeepsTheFunctionOfTheModel) {
  json text = rotated(6).to_json();
  for (const char* grid : {"input_activations", "kv_cache"}) text["grids"][grid]["num_bits"] = 8;
  run(Recipe::from_json(text, "recipe"), "out");
  EXPECT_LT(test::relative_error(logits("out"), logits("in")), 0.1);
}

TEST_P(ResidualMatrix, AnInterruptedRunContinuesToTheSameBytes) {
  const Recipe recipe = rotated(3);
  run(recipe, "whole");
  const int64_t steps = run_until(recipe, "counted", -1);
  forget("counted");
  for (const int64_t part : {3, 7}) {
    run_until(recipe, "resumed", steps * part / 8);
    run_until(recipe, "resumed", -1);
    expect_same_run("whole", "resumed");
    forget("resumed");
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ResidualMatrix, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST(ResidualMatrixRules, OnlyAPassOverTheModelLearnsIt) {
  json text = json::parse(kRotated);
  EXPECT_NO_THROW(Recipe::from_json(text, "recipe"));
  json& step = text["passes"][1]["steps"][0];
  step["weights"] = "straight_through";
  text["grids"]["weights"] = json::object();
  test::expect_refused(text.dump(), {"passes[1].steps[0].rates", "\"residual.matrix\"", "exact"});
  text["passes"][1].erase("over");
  step["weights"] = "exact";
  step["loss"] = "mse";
  test::expect_refused(text.dump(), {"passes[1].steps[0].rates", "\"residual.matrix\"", "pass over the model"});
}

}  // namespace
}  // namespace baseq
