#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "device_run.h"

namespace baseq {
namespace {

using test::CountedWork;
using test::DeviceWork;

/// How much a GPU is asked for. It works through launches of a few microseconds each, and the host waits for it at
/// every .item(): what asks for much more than today makes a run slow that no test on a CPU finds slow.
struct WorkLimit {
  std::string recipe;
  int64_t operations = 0, scalars = 0;
};
void PrintTo(const WorkLimit& limit, std::ostream* stream) { *stream << limit.recipe; }

const auto kNameOfLimit = [](const auto& of) {
  std::string name = of.param.recipe;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
};

class DeviceWorkOf : public test::DeviceRun, public testing::WithParamInterface<WorkLimit> {
 protected:
  /// The most that one linear, or one step of learning, asks for.
  DeviceWork most(bool of_learning) {
    DeviceWork most;
    std::optional<CountedWork> since;
    const auto take = [&] {
      const DeviceWork work = since->so_far();
      if (work.operations > most.operations) most.operations = work.operations, most.names = work.names;
      most.scalars = std::max(most.scalars, work.scalars);
      most.to_host = std::max(most.to_host, work.to_host);
      most.to_device = std::max(most.to_device, work.to_device);
    };
    const auto should_stop = [&] {
      // A step of learning goes from one evaluation of the loss to the next; only it moves parameters.
      if (of_learning && since && since->so_far().names.contains("aten::addcdiv")) take();
      since.emplace();
      return false;
    };
    const auto progress = [&](const ProgressEvent& event) {
      if (!of_learning && std::holds_alternative<LinearRounded>(event)) take();
    };
    const Recipe recipe = test::shortened(Recipe::read(GetParam().recipe));
    quantize(test::job_of(original, recipe, windows, directory / "out",
                          {.device = test::sealed_device(), .should_stop = should_stop}, progress));
    return most;
  }

  void expect_within(const DeviceWork& work) {
    EXPECT_GT(work.operations, 0);
    EXPECT_LE(work.operations, GetParam().operations);
    EXPECT_LE(work.scalars, GetParam().scalars);
    if (std::getenv("BASEQ_PRINT_WORK") == nullptr) return;
    std::printf("%s: %ld operations, %ld scalars, %ld copies to the host, %ld to the device\n",
                GetParam().recipe.c_str(), work.operations, work.scalars, work.to_host, work.to_device);
    for (const auto& [name, times] : work.names) std::printf("  %6ld %s\n", times, name.c_str());
  }
};

class WorkOfALinear : public DeviceWorkOf {};

TEST_P(WorkOfALinear, StaysWithinWhatWasMeasured) { expect_within(most(/*of_learning=*/false)); }

INSTANTIATE_TEST_SUITE_P(Measured, WorkOfALinear,
                         testing::Values(WorkLimit{"rtn-w4a16", 30, 3}, WorkLimit{"gptq-w4a16-g64", 1615, 5},
                                         WorkLimit{"gptq-w4a16", 1483, 5}, WorkLimit{"quarot-gptaq-w2a16-g64", 1646, 7},
                                         WorkLimit{"qera-w3a16-g64-r16", 1112, 6},
                                         WorkLimit{"fbquant-w3a16-g64-r16", 2927, 12}),
                         kNameOfLimit);

class WorkOfALearningStep : public DeviceWorkOf {};

TEST_P(WorkOfALearningStep, StaysWithinWhatWasMeasured) { expect_within(most(/*of_learning=*/true)); }

INSTANTIATE_TEST_SUITE_P(Measured, WorkOfALearningStep,
                         testing::Values(WorkLimit{"baseq-w4a4kv4", 2147, 1},
                                         WorkLimit{"fbquant-block-w3a16-g64-r16", 3352, 28}),
                         kNameOfLimit);

}  // namespace
}  // namespace baseq
