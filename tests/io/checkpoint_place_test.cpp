#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "baseq/io/checkpoint.h"
#include "one_tensor_checkpoint.h"
#include "temp_directory.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::kConfig;
using test::list;
using test::read_bytes;
using test::TempDirectory;
using test::value_of;
using test::write_bytes;
using test::write_checkpoint;
using Names = std::vector<std::string>;

const std::string kOurMark = "out.partial/.baseq-partial";

TEST(CheckpointWriter, ALinkInTheWayIsNotWrittenThrough) {
  const TempDirectory dir;
  write_bytes(dir / "victim", "mine");
  CheckpointWriter writer(dir / "out", {});
  fs::create_symlink(dir / "victim", dir / "out.partial/checkpoint/config.json.baseq.tmp");
  writer.add("a", at::ones({4}));
  writer.finish(kConfig);
  EXPECT_EQ(read_bytes(dir / "victim"), "mine");
  EXPECT_FALSE(fs::is_symlink(dir / "out/config.json"));
}

TEST(CheckpointWriter, DestroyedBeforeFinishLeavesNothing) {
  const TempDirectory dir;
  {
    CheckpointWriter writer(dir / "out", {.shard_bytes = 1});
    writer.add("a", at::ones({4}));
    writer.write_file("notes.txt", "x");
    EXPECT_EQ(list(dir.path()), Names{"out.partial"});
  }
  EXPECT_TRUE(list(dir.path()).empty());
}

TEST(CheckpointWriter, RemovesWhatAnInterruptedRunLeft) {
  const TempDirectory dir;
  fs::create_directories(dir / "out.partial/checkpoint/sub");
  write_bytes(dir / "out.partial/checkpoint/model-1.safetensors", "half");
  write_bytes(dir / kOurMark, "");
  write_checkpoint(dir / "out", 5);
  EXPECT_EQ(list(dir.path()), Names{"out"});
  EXPECT_EQ(list(dir / "out"), (Names{"config.json", "model.safetensors"}));
}

TEST(CheckpointWriter, LeavesAPartialDirectoryThatNoWriterMadeAlone) {
  const TempDirectory dir;
  fs::create_directory(dir / "out.partial");
  write_checkpoint(dir / "out", 5);  // an empty one is in nobody's way
  fs::create_directory(dir / "out.partial");
  write_bytes(dir / "out.partial/thesis.tex", "years");
  for (const bool force : {false, true}) {
    fs::remove_all(dir / "out");
    expect_error([&] { write_checkpoint(dir / "out", 5, force); },
                 {"out.partial", "no unfinished run left", "move it"});
    EXPECT_EQ(read_bytes(dir / "out.partial/thesis.tex"), "years");
  }
  // Next to what a run left, too.
  write_bytes(dir / kOurMark, "");
  write_checkpoint(dir / "out", 6);
  EXPECT_EQ(value_of(dir / "out"), 6);
  EXPECT_EQ(list(dir / "out.partial"), Names{"thesis.tex"});
}

TEST(CheckpointWriter, ASecondWriterIsRefusedAndTheFirstEndsAsIfAlone) {
  const TempDirectory dir;
  write_checkpoint(dir / "alone", 5);
  {
    CheckpointWriter writer(dir / "out", {});
    writer.add("a", at::full({4}, 5.0));
    for (const bool force : {false, true}) {
      expect_error([&] { write_checkpoint(dir / "out", 6, force); }, {"another process writes to", "out.partial"});
      expect_error([&] { CheckpointWriter::check_place(dir / "out", {.force = force}); },
                   {"another process writes to"});
    }
    writer.finish(kConfig);
    EXPECT_EQ(list(dir.path()), (Names{"alone", "out"}));
  }
  for (const std::string& name : list(dir / "alone")) {
    EXPECT_EQ(read_bytes(dir / "out" / name), read_bytes(dir / "alone" / name)) << name;
  }
}

TEST(CheckpointWriter, CheckingChangesNothing) {
  const TempDirectory dir;
  CheckpointWriter::check_place(dir / "a/out", {});
  EXPECT_TRUE(list(dir.path()).empty());
}

TEST(CheckpointWriter, NeverTouchesItsSource) {
  const TempDirectory dir;
  write_checkpoint(dir / "in/model", 1);
  write_bytes(dir / "in/config.json", "{}");
  fs::create_directory_symlink("in", dir / "link");
  fs::create_directory(dir / "linked");
  write_bytes(dir / "linked/config.json", "{}");
  fs::create_symlink("../in/model/model.safetensors", dir / "linked/model.safetensors");
  const fs::path before = fs::current_path();
  fs::current_path(dir.path());
  const auto refused = [&](const fs::path& output, const fs::path& source, const std::string& why) {
    for (const bool force : {false, true}) {
      const CheckpointWriter::Options options{.force = force, .source = source};
      expect_error([&] { CheckpointWriter(output, options); }, {why, "choose another output"});
      expect_error([&] { CheckpointWriter::check_place(output, options); }, {why});
    }
  };
  for (const fs::path& source : {dir / "in/model", dir / "link/model", fs::path("in/../link/model/")}) {
    refused(dir / "in/model", source, "is the model itself");
    refused("link/model", source, "is the model itself");
    refused(dir / "in", source, "holds the model");
    refused(dir / "link", source, "holds the model");
    refused(dir / "in/model/sub", source, "lies in the model");
    refused("link/model/a/../b/c", source, "lies in the model");
  }
  refused(dir / "in/model/model.safetensors", dir / "link/model/model.safetensors", "is the model itself");
  refused(dir / "in/model", dir / "in/model/model.safetensors", "holds the model");
  refused(dir / "in/model", dir / "linked", "which is");
  EXPECT_EQ(list(dir.path()), (Names{"in", "link", "linked"}));
  EXPECT_EQ(list(dir / "in"), (Names{"config.json", "model"}));
  EXPECT_EQ(value_of(dir / "linked"), 1);
  CheckpointWriter allowed(dir / "in/model-2", {.source = dir / "in/model"});
  fs::current_path(before);
}

TEST(CheckpointWriter, ALinkThatChangesWhileItWritesDoesNotLeadToTheSource) {
  const TempDirectory dir;
  write_checkpoint(dir / "model", 1);
  CheckpointWriter writer(dir / "out", {.force = true, .source = dir / "model"});
  writer.add("a", at::full({4}, 5));
  fs::create_directory_symlink("model", dir / "out");
  expect_error([&] { writer.finish(kConfig); }, {"is the model itself", "the complete checkpoint is kept as"});
  EXPECT_EQ(value_of(dir / "model"), 1);
}

TEST(CheckpointWriter, ReplacesACheckpointOnlyWithForceAndOnlyInFinish) {
  const TempDirectory dir;
  write_checkpoint(dir / "out", 1);
  write_bytes(dir / "out/old.txt", "old");
  expect_error([&] { write_checkpoint(dir / "out", 2); },
               {(dir / "out").string() + ": exists; pass `force` to replace it"});
  EXPECT_EQ(value_of(dir / "out"), 1);
  const Tensor old = Checkpoint(dir / "out").tensor("a");
  {
    fs::create_directory(dir / "in");
    write_bytes(dir / "in/old.txt", "old");
    CheckpointWriter writer(dir / "out", {.force = true, .source = dir / "in"});
    writer.add("a", old * 3);
    EXPECT_EQ(value_of(dir / "out"), 1);
    writer.copy_side_files(dir / "in");
    writer.finish(kConfig);
  }
  EXPECT_EQ(value_of(dir / "out"), 3);
  EXPECT_EQ(old[0].item<double>(), 1);
  EXPECT_EQ(list(dir.path()), (Names{"in", "out"}));
  EXPECT_EQ(list(dir / "out"), (Names{"config.json", "model.safetensors", "old.txt"}));
  // What is neither the source's nor this program's was put there by the user.
  expect_error([&] { write_checkpoint(dir / "out", 4, /*force=*/true); }, {"holds old.txt", "move it away"});
  EXPECT_EQ(value_of(dir / "out"), 3);
  fs::rename(dir / "out/old.txt", dir / "in/kept.txt");
  write_checkpoint(dir / "out", 4, /*force=*/true);
  EXPECT_EQ(list(dir / "out"), (Names{"config.json", "model.safetensors"}));
}

TEST(CheckpointWriter, ForceReplacesNothingButCheckpoints) {
  const TempDirectory dir;
  write_bytes(dir / "file", "x");
  expect_error([&] { write_checkpoint(dir / "file", 1, true); }, {"exists and is not a directory"});
  fs::create_directory(dir / "home");
  write_bytes(dir / "home/letter.txt", "x");
  expect_error([&] { write_checkpoint(dir / "home", 1, true); }, {"does not look like a checkpoint"});
  expect_error([&] { write_checkpoint("/", 1, true); }, {"cannot be a checkpoint"});
  expect_error([&] { write_checkpoint("", 1, true); }, {"is empty"});
  fs::create_symlink("nowhere", dir / "link");
  expect_error([&] { write_checkpoint(dir / "link", 1, true); }, {"is a link to nothing"});
  write_bytes(dir / "out.partial", "mine");
  expect_error([&] { write_checkpoint(dir / "out", 1); }, {"out.partial", "is not a directory"});
  EXPECT_EQ(list(dir.path()), (Names{"file", "home", "link", "out.partial"}));
  EXPECT_EQ(list(dir / "home"), Names{"letter.txt"});
  fs::create_directory(dir / "empty");
  write_checkpoint(dir / "empty", 1);
  EXPECT_EQ(value_of(dir / "empty"), 1);
  // An original model: all its names are those of a checkpoint, but nobody here wrote it.
  fs::create_directory(dir / "original");
  write_bytes(dir / "original/config.json", "{}");
  save_safetensors(dir / "original/model.safetensors", {{"a", at::full({4}, 7)}});
  expect_error([&] { write_checkpoint(dir / "original", 1, true); },
               {"original/model.safetensors", "not a result that"});
  EXPECT_EQ(value_of(dir / "original"), 7);
}

TEST(CheckpointWriter, ForceReplacesWhatBuildsBeforeTheMarkQuantized) {
  const TempDirectory dir;
  const fs::path out = dir / "out";
  const auto write_old = [&](const std::string& config) {
    fs::remove_all(out);
    fs::create_directory(out);
    write_bytes(out / "config.json", config);
    save_safetensors(out / "model.safetensors", {{"a", at::full({4}, 7)}});
  };
  for (const char* config :
       {R"({"quantization_config": {"quant_method": "gptq"}})", R"({"quantization_config": {}})",
        R"({"quantization_config": "baseq"})", R"({"quant_method": "baseq"})", R"({"quantization_config": {"quant_)"}) {
    write_old(config);
    const std::string before = read_bytes(out / "model.safetensors");
    expect_error([&] { write_checkpoint(out, 1, true); }, {"out/model.safetensors", "not a result that"});
    EXPECT_EQ(read_bytes(out / "model.safetensors"), before) << config;
  }
  const std::string ours = R"({"quantization_config": {"quant_method": "baseq"}})";
  write_old(ours);
  // No part of the checkpoint, so the user's.
  save_safetensors(out / "steering.safetensors", {{"a", at::full({4}, 7)}});
  expect_error([&] { write_checkpoint(out, 1, true); }, {"out/steering.safetensors", "not a result that"});
  EXPECT_EQ(list(out), (Names{"config.json", "model.safetensors", "steering.safetensors"}));
  write_old(ours);
  expect_error([&] { write_checkpoint(out, 1); }, {"pass `force` to replace it"});
  write_checkpoint(out, 1, true);
  EXPECT_EQ(value_of(out), 1);
}

TEST(CheckpointWriter, TakesPathsWithSlashesParentsAndLinks) {
  const TempDirectory dir;
  write_checkpoint(dir / "a/b/out/", 1);
  EXPECT_EQ(value_of(dir / "a/b/out"), 1);
  EXPECT_EQ(list(dir / "a/b"), Names{"out"});
  write_checkpoint(dir / "a/b/../b/out///", 2, /*force=*/true);
  EXPECT_EQ(value_of(dir / "a/b/out"), 2);
  fs::create_directory_symlink("a/b/out", dir / "link");
  write_checkpoint(dir / "link", 3, /*force=*/true);
  EXPECT_TRUE(fs::is_symlink(dir / "link"));
  EXPECT_EQ(value_of(dir / "a/b/out"), 3);
  EXPECT_EQ(list(dir.path()), (Names{"a", "link"}));
}

TEST(CheckpointWriter, KeepsTheWorkWhenTheNameIsTakenMeanwhile) {
  const TempDirectory dir;
  {
    CheckpointWriter writer(dir / "out", {});
    writer.add("a", at::full({4}, 5));
    write_bytes(dir / "out", "somebody else's");
    expect_error([&] { writer.finish(kConfig); },
                 {"exists and is not a directory", "the complete checkpoint is kept as", "out.partial"});
  }
  EXPECT_EQ(read_bytes(dir / "out"), "somebody else's");
  EXPECT_EQ(value_of(dir / "out.partial/checkpoint"), 5);
  fs::remove(dir / "out");
  expect_error([&] { write_checkpoint(dir / "out", 6); }, {"no unfinished run left"});
  EXPECT_EQ(value_of(dir / "out.partial/checkpoint"), 5) << "kept until the user has moved it away";
}

}  // namespace
}  // namespace baseq
