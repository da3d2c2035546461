#include "io/run_journal.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../tiny_model.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::TempDirectory;

RunJournal::Description description(int64_t seed = 1) {
  return {.identity = {{"recipe", {{"bits", 4}}}, {"seed", seed}},
          .details = {{"output", "somewhere"}},
          .inputs = {{"ids", at::arange(6)}}};
}

RunJournal::Tensors numbers(int64_t first) { return {{"x", at::arange(first, first + 5).to(at::kFloat)}}; }

/// A run of three steps in `directory`.
void make_run(const fs::path& directory) {
  RunJournal journal(directory, description());
  for (int64_t i = 0; i < 3; ++i) journal.finish_step(numbers(i), numbers(10 * i));
}

TEST(RunJournal, AnotherProcessFindsWhatWasFinished) {
  const TempDirectory directory;
  make_run(directory / "work");
  const RunJournal journal(directory / "work", description());
  ASSERT_EQ(journal.num_steps(), 3);
  for (int64_t i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(journal.step(i).at("x"), numbers(i).at("x")));
  EXPECT_TRUE(at::equal(journal.state().at("x").tensor, numbers(20).at("x")));
  EXPECT_EQ(journal.state().at("x").num_steps, 3);
  const auto described = RunJournal::describe(directory / "work");
  EXPECT_EQ(described.identity, description().identity);
  EXPECT_EQ(described.details, description().details);
  EXPECT_TRUE(at::equal(described.inputs.at("ids"), at::arange(6)));
  EXPECT_FALSE(fs::exists(directory / "work" / "state-00002-x.safetensors")) << "only the newest state is kept";
}

TEST(RunJournal, AnotherRunIsRefusedWithWhatDiffers) {
  const TempDirectory directory;
  make_run(directory / "work");
  auto other = description(/*seed=*/2);
  other.identity["recipe"]["bits"] = 3;
  other.identity["new"] = true;
  expect_error([&] { RunJournal(directory / "work", other); },
               {"seed (1, now 2)", "recipe/bits (4, now 3)", "new (absent, now true)"});
  other = description();
  other.inputs["ids"] = at::arange(7);
  expect_error([&] { RunJournal(directory / "work", other); }, {"other inputs"});
}

TEST(RunJournal, DamageIsFound) {
  const TempDirectory directory;
  for (const char* name : {"step-00001.safetensors", "state-00003-x.safetensors", "inputs.safetensors"}) {
    SCOPED_TRACE(name);
    const fs::path work = directory / name, file = work / name;
    make_run(work);
    const std::string whole = test::read_bytes(file);
    std::string flipped = whole;
    flipped.back() = static_cast<char>(flipped.back() ^ 1);
    for (const std::string& damaged : {flipped, whole.substr(0, whole.size() - 1), whole + "x"}) {
      test::write_bytes(file, damaged);
      expect_error([&] { RunJournal(work, description()); }, {name, "damaged"});
    }
    fs::remove(file);
    expect_error([&] { RunJournal(work, description()); }, {name});
  }
}

TEST(RunJournal, OfEachStateTheNewestIsKept) {
  const TempDirectory directory;
  {
    RunJournal journal(directory / "work", description());
    EXPECT_TRUE(journal.state().empty());
    journal.finish_step(numbers(0), {{"a", at::full({2}, 1)}, {"b", at::full({2}, 1)}});
    journal.finish_step(numbers(1), {{"b", at::full({2}, 2)}});
    journal.finish_step(numbers(2), {});
    expect_error([&] { journal.finish_step(numbers(3), {{"a/b", at::ones(1)}}); }, {"\"a/b\"", "name"});
  }
  const RunJournal journal(directory / "work", description());
  const auto state = journal.state();
  ASSERT_EQ(state.size(), 2U);
  EXPECT_EQ(state.at("a").num_steps, 1);
  EXPECT_EQ(state.at("a").tensor[0].item<int64_t>(), 1);
  EXPECT_EQ(state.at("b").num_steps, 2);
  EXPECT_EQ(state.at("b").tensor[0].item<int64_t>(), 2);
}

TEST(RunJournal, ARunOfAnotherVersionIsRefusedInASentence) {
  const TempDirectory directory;
  make_run(directory / "work");
  const fs::path path = directory / "work" / "run.json";
  auto run = nlohmann::json::parse(test::read_bytes(path));
  run.erase("journal_version");
  run.erase("crc32");
  test::write_bytes(path, run.dump());
  run["crc32"] = crc32_of_file(path);
  test::write_bytes(path, run.dump());
  expect_error([&] { RunJournal(directory / "work", description()); }, {"another version of this program"});
  expect_error([&] { RunJournal::describe(directory / "work"); }, {"another version of this program"});
}

TEST(RunJournal, NotesAreKeptWithTheirStep) {
  const TempDirectory directory;
  {
    RunJournal journal(directory / "work", description());
    journal.finish_step(numbers(0), numbers(1), {{"loss", 0.5}});
    journal.finish_step(numbers(1), numbers(2));
  }
  RunJournal journal(directory / "work", description());
  journal.finish_step(numbers(2), numbers(3), {1, 2});
  EXPECT_EQ(journal.notes(0), nlohmann::json({{"loss", 0.5}}));
  EXPECT_TRUE(journal.notes(1).is_null());
  EXPECT_EQ(journal.notes(2), nlohmann::json({1, 2}));
}

TEST(RunJournal, WhatTheJournalDoesNotNameDoesNotCount) {
  const TempDirectory directory;
  make_run(directory / "work");
  // A process died after it wrote a step and before it said so.
  test::write_bytes(directory / "work" / "step-00003.safetensors", "half");
  test::write_bytes(directory / "work" / "state-00004-x.safetensors.tmp", "half");
  RunJournal journal(directory / "work", description());
  EXPECT_EQ(journal.num_steps(), 3);
  journal.finish_step(numbers(3), numbers(30));
  EXPECT_TRUE(at::equal(journal.step(3).at("x"), numbers(3).at("x")));
}

TEST(RunJournal, WhatAStepHasReachedIsKeptUntilItIsFinished) {
  const TempDirectory directory;
  const fs::path work = directory / "work";
  const auto partials = [&] {
    std::vector<std::string> names;
    for (const std::string& name : test::list(work)) {
      if (name.starts_with("partial-")) names.push_back(name);
    }
    return names.size();
  };
  {
    RunJournal journal(work, description());
    EXPECT_FALSE(journal.partial());
    journal.save_partial(numbers(1), {{"stage", "one"}});
  }
  for (int64_t step = 0; step < 2; ++step) {
    SCOPED_TRACE(step);
    {
      RunJournal journal(work, description());
      EXPECT_EQ(journal.num_steps(), step);
      ASSERT_TRUE(journal.partial());
      EXPECT_TRUE(at::equal(journal.partial()->tensors.at("x"), numbers(1).at("x")));
      EXPECT_EQ(journal.partial()->notes, nlohmann::json({{"stage", "one"}}));
      journal.save_partial(numbers(2), {{"stage", "two"}});
      EXPECT_EQ(partials(), 1U);
    }
    test::write_bytes(work / "partial-00000-9.safetensors", "a process died before it named this");
    {
      RunJournal journal(work, description());
      EXPECT_EQ(partials(), 1U) << "what the journal does not name is removed";
      ASSERT_TRUE(journal.partial());
      EXPECT_TRUE(at::equal(journal.partial()->tensors.at("x"), numbers(2).at("x")));
      journal.finish_step(numbers(3), numbers(30));
      EXPECT_FALSE(journal.partial());
      EXPECT_EQ(partials(), 0U);
    }
    RunJournal journal(work, description());
    EXPECT_EQ(journal.num_steps(), step + 1);
    EXPECT_FALSE(journal.partial());
    journal.save_partial(numbers(1), {{"stage", "one"}});
  }
  for (const std::string& name : test::list(work)) {
    if (!name.starts_with("partial-")) continue;
    std::string bytes = test::read_bytes(work / name);
    bytes.back() = static_cast<char>(bytes.back() ^ 1);
    test::write_bytes(work / name, bytes);
    expect_error([&] { RunJournal(work, description()); }, {name, "damaged"});
  }
}

TEST(RunJournal, DetailsAreThoseOfTheLastProcess) {
  const TempDirectory directory;
  make_run(directory / "work");
  auto moved = description();
  moved.details["output"] = "elsewhere";
  { const RunJournal journal(directory / "work", moved); }
  EXPECT_EQ(RunJournal::describe(directory / "work").details, moved.details);
  EXPECT_EQ(RunJournal(directory / "work", moved).num_steps(), 3);
}

TEST(RunJournal, OnlyOneProcessAndOnlyItsOwnDirectory) {
  const TempDirectory directory;
  {
    const RunJournal journal(directory / "work", description());
    EXPECT_TRUE(RunJournal::is_held(directory / "work"));
    expect_error([&] { RunJournal(directory / "work", description()); }, {"another process"});
  }
  EXPECT_FALSE(RunJournal::is_held(directory / "work"));
  fs::create_directory(directory / "photos");
  test::write_bytes(directory / "photos" / "cat.jpg", "meow");
  expect_error([&] { RunJournal(directory / "photos", description()); }, {"cat.jpg"});
  expect_error([&] { RunJournal::describe(directory / "photos"); }, {"holds no run"});
}

TEST(RunJournal, DamagedJournalIsFound) {
  const TempDirectory directory;
  make_run(directory / "work");
  const fs::path path = directory / "work" / "journal.json";
  auto journal = nlohmann::json::parse(test::read_bytes(path));
  journal["steps"].erase(2);
  test::write_bytes(path, journal.dump());
  expect_error([&] { RunJournal(directory / "work", description()); }, {"journal.json", "damaged"});
}

TEST(RunJournal, NamesThatLeaveTheDirectoryAreRefused) {
  const TempDirectory directory;
  make_run(directory / "work");
  const fs::path path = directory / "work" / "journal.json";
  auto journal = nlohmann::json::parse(test::read_bytes(path));
  journal["steps"][1]["name"] = "../secret";
  journal.erase("crc32");
  test::write_bytes(path, journal.dump());
  journal["crc32"] = crc32_of_file(path);
  test::write_bytes(path, journal.dump());
  expect_error([&] { RunJournal(directory / "work", description()); }, {"../secret"});
}

}  // namespace
}  // namespace baseq
