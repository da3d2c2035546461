#include <gtest/gtest.h>

#include "device_run.h"

namespace baseq {
namespace {

/// A model whose tensors are larger than the pages that each of them takes at least.
class DeviceMemory : public test::DeviceRun {
 protected:
  DeviceMemory() {
    const test::TinyShape shape{.hidden_size = 256, .intermediate_size = 512, .head_dim = 64, .vocab_size = 512};
    test::write_checkpoint(directory / "in", shape);
    original = Checkpoint(directory / "in");
    windows = test::random_ids({8, 64}, shape.vocab_size, 3);
  }
  Job job_for(const Recipe& recipe, int64_t budget) const {
    return test::job_of(original, recipe, windows, directory / "out",
                        {.device = test::sealed_device(), .device_memory = budget});
  }
};

TEST_F(DeviceMemory, ThatCannotSufficeIsRefusedBeforeTheWork) {
  const Recipe recipe = Recipe::read("gptq-w4a16");
  const RunPlan plan = baseq::plan(job_for(recipe, 1 << 20));
  ASSERT_EQ(plan.problems.size(), 1U);
  for (const char* part : {"device memory: about", "needed on sealed:0", "1.0 MiB given"}) {
    EXPECT_NE(plan.problems[0].find(part), std::string::npos) << plan.problems[0];
  }
  const QuantizeOptions options{.device_memory = 1 << 20, .work_directory = directory / "work"};
  test::expect_error([&] { run_on_device(recipe, "out", options); }, {"device memory", "1.0 MiB given"});
  EXPECT_EQ(test::list(directory.path()), std::vector<std::string>{"in"});

  const test::LimitedMemory limit(test::live_bytes() + (2 << 20));
  test::expect_error([&] { run_on_device(recipe, "out"); }, {"device memory", "2.0 MiB free"});
}

}  // namespace
}  // namespace baseq
