#include <gtest/gtest.h>

#include "../pipeline/recipe_texts.h"
#include "device_run.h"

namespace baseq {
namespace {

using test::recipe_of;
using DeviceRuns = test::DeviceRun;

TEST_F(DeviceRuns, TwiceGiveTheSameBytes) {
  for (const char* text : {test::kEverything, test::kOnline}) {
    const Recipe recipe = recipe_of(text);
    SCOPED_TRACE(recipe.name);
    run_on_device(recipe, "a");
    run_on_device(recipe, "b");
    expect_same_files("a", "b");
    for (const char* name : {"a", "b"}) std::filesystem::remove_all(directory / name);
  }
}

TEST_F(DeviceRuns, ThatAreResumedGiveTheSameBytesSlow) {
  const Recipe recipe = recipe_of(test::kEverything);
  run_on_device(recipe, "whole");
  int64_t steps = 0;
  run_on_device(recipe, "counted", {.should_stop = [&] { return ++steps < 0; }});
  // In the first block before, between and after the long steps, and in the second.
  for (const int64_t last : {steps / 8, steps / 4, steps / 3, steps / 2, 2 * steps / 3, 9 * steps / 10}) {
    SCOPED_TRACE(last);
    int64_t step = 0;
    const QuantizeOptions stopping{.work_directory = directory / "work", .should_stop = [&] { return ++step > last; }};
    EXPECT_THROW(run_on_device(recipe, "resumed", stopping), Interrupted);
    run_on_device(recipe, "resumed", {.work_directory = directory / "work"});
    expect_same_files("whole", "resumed");
    for (const char* name : {"work", "resumed"}) std::filesystem::remove_all(directory / name);
  }
}

TEST_F(DeviceRuns, AreNotContinuedOnAnotherDevice) {
  const Recipe recipe = recipe_of(test::kOnline);
  const QuantizeOptions stopping{.work_directory = directory / "work", .should_stop = [] { return true; }};
  EXPECT_THROW(run_on_device(recipe, "out", stopping), Interrupted);
  test::expect_error([&] { run(recipe, "out", {.work_directory = directory / "work"}); }, {"device"});
}

TEST_F(DeviceRuns, ModelsOnTheDeviceComputeTheCpusLogits) {
  for (const char* text : {test::kEverything, test::kOnline}) {
    run(recipe_of(text), "out", {});
    const Checkpoint quantized(directory / "out");
    const Model device(quantized, {.device = test::sealed_device()});
    // The program's integer kernels are the CPU's own; floats with rounded activations may fall to another code.
    EXPECT_LT(test::relative_error(device.logits(ids).cpu(), Model(quantized).logits(ids)), 0.02);
    std::filesystem::remove_all(directory / "out");
  }
  const Model device(original, {.device = test::sealed_device()});
  EXPECT_LT(test::relative_error(device.logits(ids).cpu(), Model(original).logits(ids)), 1e-5);
}

}  // namespace
}  // namespace baseq
