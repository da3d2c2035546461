#include "pipeline/divided_run.h"

#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <set>

#include "../cluster/thread_cluster.h"
#include "../counted_checkpoint.h"
#include "tiny_run.h"

namespace baseq {
namespace {

using test::expect_error;
using test::kEverything;
using test::kOnline;
using test::recipe_of;
using test::shortened;
using test::ThreadCluster;

/// Nine windows in eight shards.
class DividedRun : public test::TinyRun {
 protected:
  DividedRun() : TinyRun({.intermediate_size = 64}) { windows = test::random_ids({9, 16}, shape.vocab_size, 3); }

  static Recipe divided(Recipe recipe, int64_t shards = 8) {
    recipe.shards = shards;
    for (Pass& pass : recipe.passes) {
      for (Step& step : pass.steps) {
        if (auto* learn = std::get_if<LearnStep>(&step)) learn->batch_size = 4;
      }
    }
    return recipe;
  }
  /// In so many processes.
  void run_in(int64_t size, const Recipe& recipe, const char* output, const QuantizeOptions& options = {}) {
    ThreadCluster cluster(size);
    cluster.run([&](const Communicator& communicator) {
      Job job = test::job_of(directory / "in", recipe, recipe.needs_calibration() ? windows : Tensor{},
                             directory / output, options);
      job.options.communicator = communicator;
      quantize(job);
    });
    bytes_sent = cluster.bytes_sent();
  }
  void expect_same_for_every_number(const Recipe& recipe, std::initializer_list<int64_t> sizes = {2, 3, 4}) {
    SCOPED_TRACE(recipe.name);
    run_in(1, recipe, "alone");
    for (const int64_t size : sizes) {
      SCOPED_TRACE(size);
      run_in(size, recipe, "together");
      expect_same_run("alone", "together");
      std::filesystem::remove_all(directory / "together");
    }
    std::filesystem::remove_all(directory / "alone");
  }

  int64_t bytes_sent = 0;
};

TEST_F(DividedRun, GptqMakesTheSameFiles) {
  expect_same_for_every_number(divided(shortened(Recipe::read("gptq-w4a16-g64"))), {2, 3, 4, 5, 7, 8});
  EXPECT_GT(bytes_sent, 0);
}

TEST_F(DividedRun, RotationsAndRoundingToNearestDoToo) {
  expect_same_for_every_number(divided(shortened(Recipe::read("quarot-w4a4kv4"))));
  expect_same_for_every_number(divided(shortened(Recipe::read("quarot-gptaq-w2a16-g64"))), {3});
  expect_same_for_every_number(recipe_of(test::kRoundToNearest), {2, 3});
}

TEST_F(DividedRun, LearningDoesToo) {
  expect_same_for_every_number(divided(shortened(Recipe::read("baseq-w4a4kv4"))));
  expect_same_for_every_number(divided(shortened(Recipe::read("baseq-plus-w4a4kv4"))), {3});
  expect_same_for_every_number(divided(recipe_of(kEverything)), {2, 5});
}

TEST_F(DividedRun, LearningOverTheModelDoesToo) {
  expect_same_for_every_number(divided(shortened(Recipe::read("best-w4a4kv4"))), {2, 3});
  expect_same_for_every_number(divided(shortened(Recipe::read("best-w3a16-g64"))), {3});
  expect_same_for_every_number(divided(shortened(Recipe::read("spinquant-w4a4kv4"))), {3});
  expect_same_for_every_number(divided(shortened(Recipe::read("ostquant-w4a4kv4"))), {2});
  // Steps after the next search of the clips, and processes without a window in a step.
  const Recipe recipe = recipe_of(R"({
    "name": "straight through", "grids": {"weights": {"num_bits": 4}},
    "calibration": {"num_samples": 9, "seq_len": 16, "shards": 8},
    "passes": [
      {"steps": [{"step": "transform", "kind": "scale", "at": ["value", "down"]}]},
      {"over": "model", "steps": [{"step": "learn", "loss": "kl", "weights": "straight_through", "steps": 12,
                                   "batch_size": 3, "num_monitored": 2, "rates": {"*.scale": 0.003}}]},
      {"steps": [{"step": "round"}]}]})");
  expect_same_for_every_number(recipe, {2, 7});
}

TEST_F(DividedRun, BlocksAreReadByOneProcessEach) {
  for (const char* architecture : {"LlamaForCausalLM", "Phi3ForCausalLM"}) {  // the second has fused tensors
    SCOPED_TRACE(architecture);
    test::write_checkpoint(directory / architecture, {.intermediate_size = 64, .architecture = architecture});
    const Checkpoint stored(directory / architecture);
    // Two passes read every block twice, and learning over the model once more.
    const Recipe recipe = divided(shortened(Recipe::read("best-w4a4kv4")));
    ThreadCluster(1).run(
        [&](const Communicator&) { quantize(test::job_of(stored, recipe, windows, directory / "alone")); });
    constexpr int64_t kSize = 3;
    std::deque<test::CountedCheckpoint> counted;
    for (int64_t rank = 0; rank < kSize; ++rank) counted.emplace_back(stored);
    ThreadCluster cluster(kSize);
    cluster.run([&](const Communicator& communicator) {
      Job job = test::job_of(counted[static_cast<size_t>(communicator.rank)].checkpoint(), recipe, windows,
                             directory / "together");
      job.options.communicator = communicator;
      quantize(job);
    });
    expect_same_run("alone", "together");
    std::set<int64_t> readers;
    for (const std::string& name : stored.names()) {
      int64_t count = 0;
      for (int64_t rank = 0; rank < kSize; ++rank) {
        if (counted[static_cast<size_t>(rank)].reads(name) == 0) continue;
        ++count;
        if (name.starts_with("model.layers.")) readers.insert(rank);
      }
      EXPECT_EQ(count, name.starts_with("model.layers.") ? 1 : kSize) << name;
    }
    EXPECT_EQ(readers.size(), kSize);
    for (const char* output : {"alone", "together"}) std::filesystem::remove_all(directory / output);
  }
}

TEST_F(DividedRun, LearningInWindowsOfBlocksDoesToo) {
  expect_same_for_every_number(divided(shortened(Recipe::read("cbq-w4a4kv4"))), {2, 3});
  expect_same_for_every_number(divided(shortened(Recipe::read("sliderquant-w4a4kv4"))), {3});
}

TEST_F(DividedRun, LowRankCorrectionsDoToo) {
  expect_same_for_every_number(divided(shortened(Recipe::read("fbquant-w3a16-g64-r16"))), {2, 3});
  expect_same_for_every_number(divided(shortened(Recipe::read("fbquant-block-w3a16-g64-r16"))), {3});
}

TEST_F(DividedRun, ScalesThatAreMeasuredDoToo) {
  expect_same_for_every_number(divided(shortened(Recipe::read("awq-w4a16-g64"))), {3});
  expect_same_for_every_number(divided(shortened(Recipe::read("smoothquant-w8a8"))), {3});
}

TEST_F(DividedRun, AnotherNumberOfProcessesContinuesIt) {
  for (const Recipe& recipe : {divided(recipe_of(kEverything)), divided(shortened(Recipe::read("best-w4a4kv4"))),
                               divided(shortened(Recipe::read("ostquant-w4a4kv4")))}) {
    SCOPED_TRACE(recipe.name);
    run_in(1, recipe, "whole");
    int64_t size = 3;
    for (int64_t last = 3; last < 60; last += 14, size = size % 4 + 1) {
      SCOPED_TRACE(last);
      std::atomic<int64_t> steps{0};
      const QuantizeOptions stopped{.work_directory = directory / "work",
                                    .should_stop = [&] { return steps++ == last; }};
      EXPECT_THROW(run_in(size, recipe, "resumed", stopped), std::exception);
      EXPECT_FALSE(std::filesystem::exists(directory / "resumed"));
    }
    run_in(2, recipe, "resumed", {.work_directory = directory / "work"});
    expect_same_run("whole", "resumed");
    for (const char* made : {"whole", "resumed", "work"}) std::filesystem::remove_all(directory / made);
  }
}

TEST_F(DividedRun, OneShardIsNotWrittenOut) {
  Recipe recipe = recipe_of(kOnline);
  EXPECT_FALSE(recipe.to_json()["calibration"].contains("shards"));
  recipe.shards = 8;
  EXPECT_EQ(recipe.to_json()["calibration"]["shards"], 8);
}

TEST_F(DividedRun, WhatCannotBeSharedIsRefusedWithTheSettingToGive) {
  expect_error([&] { run_in(3, recipe_of(kOnline), "out"); },
               {"recipe \"online\" has its calibration windows in one piece, which 3 processes cannot share",
                "set `calibration.shards` to 4"});
  expect_error([&] { run_in(5, divided(recipe_of(kOnline), 4), "out"); }, {"in 4 shards", "to 8"});
  expect_error([&] { run_in(2, divided(recipe_of(kOnline), 16), "out"); },
               {"9 calibration windows cannot be cut into 16 shards", "to 8 or less"});
  expect_error([&] { run_in(2, divided(shortened(Recipe::read("duquant-w4a4kv4"))), "out"); },
               {"a permutation or a greedy start, which 2 processes cannot share"});
  expect_error([] { recipe_of(R"({"calibration": {"shards": 6}, "steps": []})"); },
               {"recipe.json.calibration.shards: got 6, expected a power of two"});
}

TEST_F(DividedRun, AProcessWithAnotherRunIsNamed) {
  test::ThreadCluster cluster(3);
  const auto start = [&](const Communicator& communicator) {
    Job job = test::job_of(directory / "in", divided(recipe_of(kOnline)), windows, directory / "out");
    job.options.communicator = communicator;
    if (communicator.rank == 2) job.options.seed = 7;
    quantize(job);
  };
  expect_error([&] { cluster.run(start); },
               {"process 2 has another run than process 0; what differs: seed (0, now 7)"});
  EXPECT_FALSE(std::filesystem::exists(directory / "out"));
}

TEST_F(DividedRun, OtherWindowsAreAnotherRun) {
  test::ThreadCluster cluster(2);
  const auto start = [&](const Communicator& communicator) {
    Job job = test::job_of(directory / "in", divided(recipe_of(kOnline)), windows, directory / "out");
    job.options.communicator = communicator;
    if (communicator.rank == 1) job.windows = (windows + 1) % shape.vocab_size;
    quantize(job);
  };
  expect_error([&] { cluster.run(start); }, {"process 1 has another run than process 0", "inputs/input_ids/hash"});
}

TEST_F(DividedRun, TheEndOfAProcessEndsTheOthers) {
  test::ThreadCluster cluster(3);
  const auto start = [&](const Communicator& communicator) {
    Job job = test::job_of(directory / "in", divided(recipe_of(kOnline)), windows, directory / "out");
    job.options.communicator = communicator;
    if (communicator.rank == 1) job.options.should_stop = [steps = 0]() mutable { return ++steps == 9; };
    quantize(job);
  };
  EXPECT_THROW(cluster.run(start), Interrupted);
  EXPECT_NE(cluster.messages().at(0).find("process 1 has ended"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(directory / "out"));
}

}  // namespace
}  // namespace baseq
