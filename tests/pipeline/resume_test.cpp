#include <gtest/gtest.h>

#include "baseq/pipeline/job.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::kEverything;
using test::kOnline;
using test::recipe_of;
using test::TinyShape;

class Resume : public test::TinyRun, public testing::WithParamInterface<TinyShape> {
 protected:
  Resume() : TinyRun(GetParam()) {}
};

INSTANTIATE_TEST_SUITE_P(Shapes, Resume, testing::ValuesIn(test::tiny_shapes()), test::shape_name);

TEST_P(Resume, AnInterruptedRunContinuesToTheSameBytes) {
  for (const char* text : {kEverything, kOnline}) {
    const Recipe recipe = recipe_of(text);
    SCOPED_TRACE(recipe.name);
    run(recipe, "whole");
    const int64_t steps = run_until(recipe, "counted", -1);
    forget("counted");
    // Twice in one run, in different stages.
    for (const int64_t first : {steps / 7, steps * 2 / 7, steps * 3 / 7, steps * 5 / 7}) {
      SCOPED_TRACE(first);
      EXPECT_EQ(run_until(recipe, "resumed", first), first + 1);
      run_until(recipe, "resumed", steps / 5);
      run_until(recipe, "resumed", -1);
      expect_same_run("whole", "resumed");
      forget("resumed");
    }
    std::filesystem::remove_all(directory / "whole");
  }
}

TEST_P(Resume, GoesOnAfterTheLastFinishedStage) {
  const Recipe recipe = recipe_of(kEverything);
  const int64_t steps = run_until(recipe, "whole", -1);
  forget("whole");
  // What was told of the second block before the run was stopped, and what the next process had to do.
  std::map<std::string, int64_t> steps_after;
  std::vector<std::string> kept;
  for (const std::string last : {"block_started", "transforms", "rounding"}) {
    SCOPED_TRACE(last);
    bool there = false;
    int64_t rounded = 0;
    const ProgressFn progress = [&](const ProgressEvent& event) {
      if (const auto* started = std::get_if<BlockStarted>(&event))
        there = started->block == 1 && last == "block_started";
      const auto* stage = std::get_if<StageLearned>(&event);
      if (stage && stage->block == 1 && last == stage->stage) there = true;
      const auto* linear = std::get_if<LinearRounded>(&event);
      if (linear && linear->block == 1 && ++rounded == 7 && last == "rounding") there = true;
    };
    // The step after the one that follows the event: the stage is at its end by then.
    int64_t after = 0;
    const QuantizeOptions options{.work_directory = directory / "work",
                                  .should_stop = [&] { return there && ++after == 2; }};
    EXPECT_THROW(run(recipe, "resumed", options, progress), Interrupted);
    std::optional<RunResumed> resumed;
    std::vector<json> told;
    steps_after[last] = run_until(recipe, "resumed", -1, [&](const ProgressEvent& event) {
      if (const auto* found = std::get_if<RunResumed>(&event)) resumed = *found;
      told.push_back(to_json(event));
    });
    ASSERT_TRUE(resumed);
    EXPECT_EQ(resumed->num_finished, 1);
    kept.push_back(resumed->stage);
    // A reader of the events knows all of the block, though a part of it happened in another process.
    RunRecord record;
    for (const json& event : told) record.add(*progress_event_from_json(event, "told"));
    EXPECT_EQ(record.blocks.at(1).linears.size(), 7U);
    EXPECT_EQ(record.blocks.at(1).stages.size(), 2U);
    forget("resumed");
  }
  EXPECT_EQ(kept, (std::vector<std::string>{"", "transforms", "rounding"}));
  EXPECT_LT(steps_after["block_started"], steps);
  EXPECT_LT(steps_after["transforms"], steps_after["block_started"]);
  EXPECT_LT(steps_after["rounding"], steps_after["transforms"]);
}

TEST_P(Resume, AnInterruptSaysWhatIsKept) {
  const Recipe recipe = recipe_of(kEverything);
  const int64_t steps = run_until(recipe, "out", 0);
  EXPECT_EQ(steps, 1);
  EXPECT_NE(message.find("stopped in block 1 of 2; kept are the blocks before, lost the last"), std::string::npos)
      << message;
  run_until(recipe, "out", -1);
  forget("out");
  bool rounding = false;
  const QuantizeOptions options{.work_directory = directory / "work", .should_stop = [&] { return rounding; }};
  try {
    run(recipe, "out", options,
        [&](const ProgressEvent& event) { rounding = rounding || std::holds_alternative<LinearRounded>(event); });
    FAIL() << "not stopped";
  } catch (const Interrupted& interrupted) {
    const std::string what = interrupted.what();
    EXPECT_NE(what.find("stopped in block 1 of 2; kept are the blocks before and this one up to its transforms"),
              std::string::npos)
        << what;
  }
  EXPECT_THROW(run(recipe, "out", {.should_stop = [] { return true; }}), Interrupted);
}

TEST_P(Resume, TheWorkDirectoryDescribesTheRun) {
  const Recipe recipe = recipe_of(kEverything);
  run_until(recipe, "out", 1);
  const StoredRun stored = read_stored_run(directory / "work");
  EXPECT_EQ(stored.job.recipe.to_json(), recipe.to_json());
  EXPECT_TRUE(at::equal(stored.job.windows, windows));
  EXPECT_EQ(stored.job.output, directory / "out");
  EXPECT_EQ(std::get<std::filesystem::path>(stored.job.model), directory / "in");

  const QuantizeOptions options{.work_directory = directory / "work"};
  Recipe changed = recipe;
  changed.grids.weights->num_bits = 3;
  expect_error([&] { run(changed, "other", options); }, {"recipe/grids/weights/num_bits (4, now 3)"});
  windows = windows + 1;
  expect_error([&] { run(recipe, "other", options); }, {"other inputs"});
}

/// More blocks than a work directory goes without the full-precision stream.
class ManyBlocks : public test::TinyRun {
 protected:
  ManyBlocks() : TinyRun({.num_layers = 6}) {}
};

TEST_F(ManyBlocks, TheFullPrecisionStreamIsMadeAgainToTheSameBytes) {
  for (const char* text : {kEverything, kOnline}) {
    const Recipe recipe = recipe_of(text);
    run(recipe, "whole");
    for (int64_t last = 1; last < 6; ++last) {
      SCOPED_TRACE(last);
      bool there = false;
      const QuantizeOptions options{.work_directory = directory / "work", .should_stop = [&] { return there; }};
      const auto progress = [&](const ProgressEvent& event) {
        const auto* started = std::get_if<BlockStarted>(&event);
        there = there || (started && started->block == last);
      };
      EXPECT_THROW(run(recipe, "resumed", options, progress), Interrupted);
      std::vector<std::string> states;
      for (const std::string& name : test::list(directory / "work")) {
        if (name.starts_with("state-")) states.push_back(name);
      }
      std::vector<std::string> expected;
      if (last >= 4) expected.emplace_back("state-00004-full_precision.safetensors");
      expected.push_back("state-0000" + std::to_string(last) + "-quantized.safetensors");
      EXPECT_EQ(states, expected);
      run(recipe, "resumed", {.work_directory = directory / "work"});
      expect_same_files("whole", "resumed");
      forget("resumed");
    }
    std::filesystem::remove_all(directory / "whole");
  }
}

class ChangedModel : public test::TinyRun {
 protected:
  void start() {
    const QuantizeOptions options{.work_directory = directory / "work", .should_stop = [] { return true; }};
    EXPECT_THROW(run(recipe, "out", options), Interrupted);
  }
  void go_on(const std::filesystem::path& model) {
    quantize(test::job_of(model, recipe, windows, directory / "out", {.work_directory = directory / "work"}));
  }
  Recipe recipe = recipe_of(kOnline);
};

TEST_F(ChangedModel, IsRefusedWithWhatDiffers) {
  start();
  const std::filesystem::path weights = directory / "in" / "model.safetensors";
  const auto time = std::filesystem::last_write_time(weights);
  std::string bytes = test::read_bytes(weights);
  bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  test::write_bytes(weights, bytes);
  std::filesystem::last_write_time(weights, time + std::chrono::seconds(1));
  expect_error([&] { go_on(directory / "in"); }, {"model/model.safetensors/crc32"});
  std::filesystem::remove(weights);
  EXPECT_ANY_THROW(go_on(directory / "in"));
}

TEST_F(ChangedModel, ACopyIsTheSameModel) {
  start();
  std::filesystem::copy(directory / "in", directory / "copy");
  for (const auto& entry : std::filesystem::directory_iterator(directory / "copy")) {
    std::filesystem::last_write_time(entry, std::filesystem::file_time_type::clock::now() + std::chrono::hours(1));
  }
  std::filesystem::remove_all(directory / "in");
  go_on(directory / "copy");
  EXPECT_TRUE(std::filesystem::exists(directory / "out"));
  EXPECT_EQ(std::get<std::filesystem::path>(read_stored_run(directory / "work").job.model), directory / "copy")
      << "--resume finds it there";
}

TEST_F(ChangedModel, WeightsThatAreNotReadAreNoPartOfIt) {
  start();
  save_safetensors(directory / "in" / "consolidated.safetensors", {{"layers.0.attention.wq.weight", at::ones({4, 4})}});
  go_on(directory / "in");
  EXPECT_TRUE(std::filesystem::exists(directory / "out"));
}

/// Every moment of one run; the other tests take a few of each shape.
class EveryMoment : public test::TinyRun {};

TEST_F(EveryMoment, OfARunCanBeItsLastSlow) {
  const Recipe recipe = recipe_of(kEverything);
  run(recipe, "whole");
  const auto finish = [&] {
    std::filesystem::remove_all(directory / "resumed");  // of a run that had come to its end
    run(recipe, "resumed", {.work_directory = directory / "work"});
    expect_same_run("whole", "resumed");
    forget("resumed");
  };
  // Interrupted at a step.
  for (int64_t n = 0;; ++n) {
    SCOPED_TRACE(n);
    const bool stopped = run_until(recipe, "resumed", n) == n + 1;
    finish();
    if (!stopped || HasFailure()) break;
  }
  // Ended by an exception at an event.
  for (int64_t n = 0;; ++n) {
    SCOPED_TRACE(n);
    int64_t events = 0;
    const ProgressFn progress = [&](const ProgressEvent&) {
      if (events++ == n) throw std::runtime_error("the end");
    };
    bool stopped = false;
    try {
      run(recipe, "resumed", {.work_directory = directory / "work"}, progress);
    } catch (const std::runtime_error&) {
      stopped = true;
    }
    finish();
    if (!stopped || HasFailure()) break;
  }
}

}  // namespace
}  // namespace baseq
