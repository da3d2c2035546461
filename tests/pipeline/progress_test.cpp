#include <gtest/gtest.h>

#include <cmath>

#include "../tiny_model.h"
#include "baseq/pipeline/job.h"
#include "pipeline/run_log.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;
using test::TempDirectory;

std::vector<ProgressEvent> one_of_each() {
  return {RunStarted{.model = "m\"<\n",
                     .num_blocks = 3,
                     .num_samples = 4,
                     .seq_len = 5,
                     .seed = UINT64_MAX,
                     .device = "cpu",
                     .num_threads = 2},
          RunResumed{1, 3, "transforms"},
          BlockStarted{1, 3},
          LinearRounded{1, "self_attn.q_proj", 0.25, 0.01, 1.5},
          EpochLearned{1, "transforms", 2, 10, 0.125},
          StageLearned{1, "transforms", 0.5, 0.125, 2.5},
          PointMeasured{.block = 1,
                        .name = "mlp.input_quant",
                        .before = {-3, 4, 1, 4, 0.5},
                        .after = {-2, 2, 1, 2, 0.25},
                        .enabled = true,
                        .clip = {0.5, 0.75},
                        .min_gain = 0.5,
                        .max_gain = 2},
          BlockFinished{1, 3, 0.01, 3.5, int64_t{1} << 40},
          Warning{"careful"},
          RunFinished{9},
          TransformChosen{1, "down", 1, "smooth, hadamard", {0.5, 0.25}}};
}

TEST(ProgressEvent, IsReadAsItWasWritten) {
  for (const ProgressEvent& event : one_of_each()) {
    const json written = to_json(event);
    const auto read = progress_event_from_json(json::parse(written.dump()), "log");
    ASSERT_TRUE(read) << written;
    EXPECT_EQ(read->index(), event.index());
    EXPECT_EQ(to_json(*read), written);
  }
  const PointMeasured point = std::get<PointMeasured>(*progress_event_from_json(to_json(one_of_each()[6]), "log"));
  EXPECT_EQ(point.after.min, -2);
  EXPECT_EQ(point.clip, (std::vector<double>{0.5, 0.75}));
  EXPECT_EQ(point.max_gain, 2);
  EXPECT_FALSE(point.max_shift);
}

TEST(ProgressEvent, WhatIsNoNumberIsNull) {
  const json written = to_json(BlockFinished{0, 1, std::nan(""), 1});
  EXPECT_TRUE(written.at("relative_error").is_null());
  EXPECT_TRUE(std::isnan(std::get<BlockFinished>(*progress_event_from_json(written, "log")).relative_error));
}

TEST(ProgressEvent, UnknownKindsAreSkippedAndWrongFieldsNamed) {
  EXPECT_FALSE(progress_event_from_json({{"event", "block_painted"}}, "log"));
  EXPECT_FALSE(progress_event_from_json(json::object(), "log"));
  expect_error(
      [] {
        progress_event_from_json({{"event", "block_finished"}, {"block", "one"}}, "log:7");
      },
      {"log:7", "block", "\"one\""});
  expect_error([] { progress_event_from_json({{"event", "point_measured"}, {"before", 1}}, "log:7"); }, {"before"});
  expect_error([] { progress_event_from_json(json::array(), "log:7"); }, {"log:7", "expected an object"});
}

TEST(RunLog, ALaterPassAddsToWhatABlockTold) {
  RunRecord record;
  record.add(BlockStarted{.block = 1, .num_blocks = 2});
  record.add(LinearRounded{.block = 1, .name = "mlp.up_proj"});
  record.add(BlockFinished{.block = 1, .num_blocks = 2, .relative_error = 0.5, .seconds = 3});
  record.add(BlockStarted{.block = 1, .num_blocks = 2, .pass = 1});
  record.add(StageLearned{.block = 1, .stage = "learn"});
  record.add(BlockFinished{.block = 1, .num_blocks = 2, .relative_error = 0.25, .seconds = 4});
  const BlockRecord& block = record.blocks.at(1);
  EXPECT_EQ(block.linears.size(), 1U);
  EXPECT_EQ(block.stages.size(), 1U);
  EXPECT_EQ(block.finished->relative_error, 0.25);
  EXPECT_EQ(record.seconds(), 7);
}

TEST(RunLog, ABlockThatBeginsAgainForgetsItsFirstAttempt) {
  const TempDirectory directory;
  std::string text;
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (const ProgressEvent& event : one_of_each()) text += log_line(to_json(event));
  }
  test::write_bytes(directory / "log", text + "{\"event\": \"warni");
  const RunRecord record = read_run_log(directory / "log");
  ASSERT_EQ(record.blocks.size(), 1U);
  const BlockRecord& block = record.blocks.at(1);
  EXPECT_EQ(block.linears.size(), 1U);
  EXPECT_EQ(block.stages.size(), 1U);
  EXPECT_EQ(block.epochs.size(), 1U);
  EXPECT_EQ(block.points.size(), 1U);
  EXPECT_EQ(record.warnings.size(), 2U);
  EXPECT_EQ(record.seconds(), 3.5);
  EXPECT_EQ(record.peak_memory_bytes(), int64_t{1} << 40);
  EXPECT_EQ(record.started->seed, UINT64_MAX);
}

TEST(RunLog, DamageIsNamedByItsLine) {
  const TempDirectory directory;
  test::write_bytes(directory / "log", "{\"event\": \"warning\"}\n[1,\n");
  expect_error([&] { read_run_log(directory / "log"); }, {"log:2", "not valid JSON"});
  expect_error([&] { read_run_log(directory / "absent"); }, {"absent", "cannot be opened"});
}

TEST(RunLog, TextThatIsNotUtf8StaysOneLine) {
  const std::string line = log_line(to_json(Warning{"a\xff\nb"}));
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  EXPECT_NO_THROW(json::parse(line));
}

TEST(ProgressEvents, GoToTheFunctionsThatTakeThem) {
  std::string told;
  const ProgressFn progress = on_events([&](const LinearRounded& linear) { told += linear.name + ";"; },
                                        [&, count = 0](Warning) mutable { told += std::to_string(++count) + ";"; },
                                        [&](const auto&) { told += "any;"; });
  progress(BlockStarted{.block = 1});
  progress(LinearRounded{.block = 1, .name = "q_proj"});
  progress(Warning{"x"});
  progress(Warning{"y"});
  EXPECT_EQ(told, "any;q_proj;any;1;any;2;any;");
}

TEST(ProgressEvents, NameTheModelInPlaceOfABlock) {
  const nlohmann::json written = to_json(EpochLearned{kWholeModel, "tuning", 2, 8, 0.5});
  EXPECT_EQ(written.at("block"), "model");
  const auto read = progress_event_from_json(written, "log");
  ASSERT_TRUE(read);
  EXPECT_EQ(std::get<EpochLearned>(*read).block, kWholeModel);
  RunRecord record;
  record.add(*read);
  record.add(BlockFinished{.block = kWholeModel, .num_blocks = 2, .relative_error = 0, .seconds = 5});
  EXPECT_TRUE(record.blocks.empty());
  EXPECT_EQ(record.model.epochs.size(), 1U);
  EXPECT_EQ(record.seconds(), 5);
}

}  // namespace
}  // namespace baseq
