#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "baseq/model/model.h"
#include "pipeline/activations.h"
#include "quant/bfloat16_product.h"
#include "quant/matmul_precision.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using test::expect_error;
using test::kEverything;
using test::kOnline;
using test::recipe_of;

class MatmulPrecisionRun : public test::TinyRun {
 protected:
  static Recipe with(MatmulPrecision precision, Recipe recipe) {
    recipe.matmul_precision = precision;
    return recipe;
  }
};

TEST_F(MatmulPrecisionRun, TwoRunsAndAResumedOneGiveTheSameBytes) {
  for (const char* text : {kEverything, kOnline}) {
    const Recipe recipe = with(MatmulPrecision::kMedium, recipe_of(text));
    SCOPED_TRACE(recipe.name);
    run(recipe, "whole");
    const int64_t steps = run_until(recipe, "again", -1);
    expect_same_run("whole", "again");
    forget("again");
    run_until(recipe, "resumed", steps / 3);
    run_until(recipe, "resumed", steps / 3);
    run_until(recipe, "resumed", -1);
    expect_same_run("whole", "resumed");
    forget("resumed");
    std::filesystem::remove_all(directory / "whole");
  }
}

TEST_F(MatmulPrecisionRun, IsCloseToFloat32AndOnTheCpuOnlyMediumDiffers) {
  const Recipe recipe = test::at_eight_bits(kEverything);
  run(recipe, "highest");
  run(with(MatmulPrecision::kHigh, recipe), "high");
  run(with(MatmulPrecision::kMedium, recipe), "medium");
  expect_same_files("highest", "high", /*same_recipe=*/false);
  const Tensor expected = logits("highest");
  EXPECT_EQ(at::equal(logits("medium"), expected), !has_bfloat16_products());
  // Codes of 8 bits differ where rounding stood between two of them: by what they would have been wrong anyway.
  const double error = test::relative_error(logits("medium"), expected);
  EXPECT_LT(error, 2 * test::relative_error(expected, logits("in")) + 1.0 / 256);
}

TEST_F(MatmulPrecisionRun, AnotherPrecisionIsAnotherRun) {
  const Recipe recipe = recipe_of(kOnline);
  run_until(recipe, "out", 20);
  expect_error([&] { run_until(with(MatmulPrecision::kMedium, recipe), "out", -1); },
               {"recipe/calibration/matmul_precision", "another run"});
  run_until(recipe, "out", -1);
}

TEST_F(MatmulPrecisionRun, HoldsInAPassAndNotAfterIt) {
  const Tensor stream = at::randn({2, 4, 8});
  const PassOptions options{.matmul_precision = MatmulPrecision::kMedium};
  int64_t seen = 0;
  const auto count = [&](int64_t, const Tensor&) {
    ++seen;
    EXPECT_EQ(MatmulPrecisionScope::current(), MatmulPrecision::kMedium);
  };
  for_each_batch(stream, stream.options(), count, options);
  EXPECT_GT(seen, 0);
  EXPECT_EQ(MatmulPrecisionScope::current(), MatmulPrecision::kHighest);
  const auto fail = [](int64_t, const Tensor&) { throw Interrupted("asked to stop"); };
  EXPECT_THROW(for_each_batch(stream, stream.options(), fail, options), Interrupted);
  EXPECT_EQ(MatmulPrecisionScope::current(), MatmulPrecision::kHighest);
}

}  // namespace
}  // namespace baseq
