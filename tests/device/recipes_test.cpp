#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "../pipeline/recipe_texts.h"
#include "device_run.h"

namespace baseq {
namespace {

using test::recipe_of;

/// A recipe and its name as that of a test.
struct NamedRecipe {
  std::string name;
  Recipe recipe;
};
void PrintTo(const NamedRecipe& named, std::ostream* stream) { *stream << named.name; }

/// One recipe of each kind; the others are slow for their number.
const std::set<std::string_view> kQuick = {
    "rtn-w4a16", "gptq-w4a16-g64",     "qera-w3a16-g64-r16", "fbquant-w4a16-g64-r16",
    "rotated",   "baseq-plus-w4a4kv4", "smoothquant-w8a8",   "ablation-2-clip"};

std::vector<NamedRecipe> all_recipes() {
  std::vector<NamedRecipe> recipes = {{"everything", recipe_of(test::kEverything)},
                                      {"online_Slow", recipe_of(test::kOnline)}};
  for (const BuiltInRecipe& built_in : built_in_recipes()) {
    std::string name(built_in.name);
    const bool quick = kQuick.contains(name);
    std::replace_if(
        name.begin(), name.end(), [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
    recipes.push_back({name + (quick ? "" : "_Slow"), Recipe::read(std::string(built_in.name))});
  }
  return recipes;
}

bool learns_anything(const Recipe& recipe) {
  const RoundStep* round = recipe.round_step();
  return recipe.learns() || (round && round->low_rank && round->low_rank->method == LowRankOptions::Method::kFbquant);
}

/// The last bits of products differ from device to device, and decide what falls on a tie: on a symmetric grid the
/// largest value of each row does. Activations have such ties in every token, and factors of low rank in bfloat16
/// change by a 256th. Where there is neither, the codes are the CPU's.
struct Tolerances {
  double rounding = 1e-2, learning = 0.2, logits = 1e-5;

  explicit Tolerances(const Recipe& recipe) {
    const RoundStep* round = recipe.round_step();
    if (!learns_anything(recipe) && !recipe.grids.input_activations && !(round && round->low_rank)) return;
    rounding = 0.3;
    logits = std::numeric_limits<double>::infinity();
  }
};

class DeviceRecipe : public test::DeviceRun, public testing::WithParamInterface<NamedRecipe> {};

TEST_P(DeviceRecipe, GivesWhatTheCpuGives) {
  const Recipe recipe = test::shortened(GetParam().recipe);
  const Tolerances tolerances(recipe);
  const Told cpu = run(recipe, "cpu", {}), device = run_on_device(recipe, "device");
  if (!learns_anything(recipe)) {
    EXPECT_EQ(device.warnings, cpu.warnings);
  }
  ASSERT_EQ(device.linears.size(), cpu.linears.size());
  ASSERT_EQ(device.stages.size(), cpu.stages.size());
  for (const auto& [name, linear] : cpu.linears) {
    const LinearRounded& other = device.linears.at(name);
    EXPECT_NEAR(other.relative_error, linear.relative_error, tolerances.rounding * linear.relative_error) << name;
    EXPECT_EQ(other.damping, linear.damping) << name;
  }
  for (const auto& [name, stage] : cpu.stages) {
    const StageLearned& other = device.stages.at(name);
    EXPECT_NEAR(other.loss_before, stage.loss_before, tolerances.learning * stage.loss_before) << name;
    EXPECT_NEAR(other.loss_after, stage.loss_after, tolerances.learning * stage.loss_after) << name;
  }
  EXPECT_LT(test::relative_error(logits("device"), logits("cpu")), tolerances.logits);
  const Tensor exact = Model(original).logits(ids);
  EXPECT_LT(test::relative_error(logits("device"), exact), 1.25 * test::relative_error(logits("cpu"), exact) + 1e-5);
}

INSTANTIATE_TEST_SUITE_P(All, DeviceRecipe, testing::ValuesIn(all_recipes()),
                         [](const auto& of) { return of.param.name; });

}  // namespace
}  // namespace baseq
