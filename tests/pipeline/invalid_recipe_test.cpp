#include <gtest/gtest.h>

#include "../job_of.h"
#include "../tiny_model.h"
#include "baseq/pipeline/job.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;

struct InvalidRecipe {
  const char* problem;
  Recipe recipe;
};

/// Recipes that only C++ can build, or that a file may not say.
std::vector<InvalidRecipe> invalid_recipes() {
  Recipe valid{.name = "mine"};
  valid.grids.weights = QuantSpec{.num_bits = 4};
  valid.passes[0].steps = {RoundStep{}};
  std::vector<InvalidRecipe> invalid(5, {"", valid});
  invalid[0].problem = "num_bits";
  invalid[0].recipe.grids.weights->num_bits = 12;
  invalid[1].problem = "recipe \"mine\"";  // a grid without its points
  invalid[1].recipe.grids.input_activations = Grids::kPerToken;
  invalid[2].problem = "clip";
  invalid[2].recipe.grids.input_activations = Grids::kPerToken;
  invalid[2].recipe.passes[0].steps.insert(
      invalid[2].recipe.passes[0].steps.begin(),
      PointsStep{.at = {Site::kQkv, Site::kO, Site::kGateUp, Site::kDown}, .clip = 0});
  invalid[3].problem = "recipe \"mine\"";  // nothing rounds
  invalid[3].recipe.passes[0].steps.clear();
  invalid[4].problem = "dtype";
  invalid[4].recipe.dtype = at::kInt;
  return invalid;
}

TEST(InvalidRecipe, IsRefusedByEveryFunctionThatTakesOne) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", test::TinyShape{});
  const Checkpoint checkpoint(directory / "in");
  for (const auto& [problem, recipe] : invalid_recipes()) {
    SCOPED_TRACE(problem);
    expect_error([&] { quantize(test::job_of(checkpoint, recipe, {}, directory / "out")); }, {problem});
    EXPECT_EQ(test::list(directory.path()), std::vector<std::string>{"in"});
    expect_error([&] { estimate_seconds(test::job_of(checkpoint, recipe, {}, {})); }, {problem});
    expect_error([&] { fit_memory(test::job_of(checkpoint, recipe, {}, {}), int64_t{1} << 40); }, {problem});
    const RunPlan plan = baseq::plan(test::job_of(checkpoint, recipe, {}, directory / "out"));
    ASSERT_EQ(plan.problems.size(), 1u);
    EXPECT_NE(plan.problems[0].find(problem), std::string::npos) << plan.problems[0];
  }
}

TEST(InvalidWindows, AreRefusedByTheirShapeAndDtype) {
  const TempDirectory directory;
  test::write_checkpoint(directory / "in", test::TinyShape{});
  const Checkpoint checkpoint(directory / "in");
  Recipe recipe;
  recipe.grids.weights = QuantSpec{.num_bits = 4};
  recipe.passes[0].steps = {RoundStep{.method = RoundStep::Method::kGptq}};
  for (const Tensor& windows : {at::zeros({2, 8}), at::zeros({8}, at::kLong)}) {
    expect_error([&] { quantize(test::job_of(checkpoint, recipe, windows, directory / "out")); },
                 {"quantize: windows are", "expected token ids [num_windows, seq_len]"});
  }
}

}  // namespace
}  // namespace baseq
