#include "baseq/io/checkpoint.h"

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <gtest/gtest.h>

#include "temp_directory.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::error_of;
using test::expect_error;
using test::TempDirectory;
using test::write_bytes;

// Two shards: one.safetensors with "a" and "b", two.safetensors with "c" and, unknown to the index, "d".
json write_sharded(const fs::path& directory) {
  save_safetensors(directory / "one.safetensors", {{"a", at::full({2}, 1.0)}, {"b", at::full({2}, 2.0)}});
  save_safetensors(directory / "two.safetensors", {{"c", at::full({2}, 3.0)}, {"d", at::full({2}, 4.0)}});
  json index;
  index["weight_map"] = {{"a", "one.safetensors"}, {"b", "one.safetensors"}, {"c", "two.safetensors"}};
  write_bytes(directory / "model.safetensors.index.json", index.dump());
  write_bytes(directory / "config.json", R"({"hidden_size": 8})");
  return index;
}

void expect_refused(const fs::path& directory, std::vector<std::string> parts) {
  parts.push_back(directory.string());
  expect_error([&] { Checkpoint checkpoint(directory); }, parts);
}

TEST(Checkpoint, ReadsOneFile) {
  const TempDirectory dir;
  save_safetensors(dir / "model.safetensors", {{"a", at::ones({2})}, {"b", at::zeros({3})}});
  write_bytes(dir / "config.json", R"({"hidden_size": 8})");
  const Checkpoint checkpoint(dir.path());
  EXPECT_EQ(checkpoint.path(), dir.path());
  EXPECT_EQ(checkpoint.config().at("hidden_size"), 8);
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(at::equal(checkpoint.tensor("b"), at::zeros({3})));
  EXPECT_EQ(checkpoint.num_bytes(), static_cast<int64_t>(fs::file_size(dir / "model.safetensors")));
  expect_error([&] { checkpoint.tensor("x"); }, {"has no tensor \"x\"", dir.path().string()});
}

TEST(Checkpoint, FilesAreThoseThatItReads) {
  const TempDirectory dir;
  write_sharded(dir.path());
  save_safetensors(dir / "consolidated.safetensors", {{"a", at::ones({2})}});
  EXPECT_EQ(Checkpoint(dir.path()).files(), (std::set<std::string>{"config.json", "model.safetensors.index.json",
                                                                   "one.safetensors", "two.safetensors"}));
  save_safetensors(dir / "model.safetensors", {{"a", at::ones({2})}});
  EXPECT_EQ(Checkpoint(dir.path()).files(), (std::set<std::string>{"config.json", "model.safetensors"}));
}

TEST(Checkpoint, MadeTensorsAreMadeWhenTheyAreRead) {
  int made = 0;
  const auto make = [&] { return at::full({2, 3}, static_cast<double>(++made)); };
  const Checkpoint checkpoint("model.gguf", {{"hidden_size", 8}}, {{"a", {{at::kFloat, {2, 3}}, make}}}, 100);
  EXPECT_EQ(checkpoint.info("a").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(checkpoint.info("a").nbytes(), 24);
  EXPECT_EQ(made, 0);
  EXPECT_EQ(checkpoint.tensor("a")[0][0].item<float>(), 1);
  EXPECT_EQ(made, 1);
  const Checkpoint wrong("model.gguf", {}, {{"a", {{at::kFloat, {3, 2}}, make}}}, 100);
  expect_error([&] { wrong.tensor("a"); }, {"model.gguf", "\"a\"", "[3, 2]", "[2, 3]"});
}

TEST(Checkpoint, ReadsShardsAndTensorsOutliveIt) {
  const TempDirectory dir;
  write_sharded(dir.path());
  Tensor a, c;
  {
    const Checkpoint checkpoint(dir / "");
    EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b", "c"}));
    EXPECT_FALSE(checkpoint.contains("d"));
    EXPECT_EQ(checkpoint.num_bytes(),
              static_cast<int64_t>(fs::file_size(dir / "one.safetensors") + fs::file_size(dir / "two.safetensors")));
    a = checkpoint.tensor("a");
    c = checkpoint.tensor("c");
  }
  EXPECT_TRUE(at::equal(a, at::full({2}, 1.0)));
  EXPECT_TRUE(at::equal(c, at::full({2}, 3.0)));
}

TEST(Checkpoint, PrefersOneFileToAnIndex) {
  const TempDirectory dir;
  write_sharded(dir.path());
  save_safetensors(dir / "model.safetensors", {{"e", at::ones({2})}});
  EXPECT_EQ(Checkpoint(dir.path()).names(), std::vector<std::string>{"e"});
}

TEST(Checkpoint, ReadsThroughLinksAsInACache) {
  const TempDirectory dir;
  fs::create_directory(dir / "blobs");
  fs::create_directory(dir / "snapshot");
  save_safetensors(dir / "blobs/1f", {{"a", at::ones({2})}});
  write_bytes(dir / "blobs/2e", "{}");
  fs::create_symlink("../blobs/1f", dir / "snapshot/model.safetensors");
  fs::create_symlink("../blobs/2e", dir / "snapshot/config.json");
  EXPECT_TRUE(Checkpoint(dir / "snapshot").contains("a"));
}

TEST(Checkpoint, NamesWhatTheDirectoryLacks) {
  const TempDirectory dir;
  expect_refused(dir / "absent", {"is not a directory"});
  expect_refused(dir.path(), {"has no config.json"});
  write_bytes(dir / "config.json", "{}");
  expect_refused(dir.path(), {"neither model.safetensors nor model.safetensors.index.json"});
  write_bytes(dir / "training_args.bin", "");
  expect_refused(dir.path(), {"neither model.safetensors nor"});
  write_bytes(dir / "pytorch_model.bin", "");
  expect_refused(dir.path(), {"\"pytorch_model.bin\"", "save_pretrained", "safetensors"});
}

TEST(Checkpoint, NamesThePositionOfAConfigError) {
  const TempDirectory dir;
  save_safetensors(dir / "model.safetensors", {});
  write_bytes(dir / "config.json", "{\n  \"hidden_size\": 8,\n  oops\n}");
  expect_refused(dir.path(), {"config.json is not valid JSON", "line 3, column 3"});
  write_bytes(dir / "config.json", "[1]");
  expect_refused(dir.path(), {"config.json holds a JSON array, expected an object"});
  write_bytes(dir / "config.json", "{\"a\": \"\xff\"}");
  expect_refused(dir.path(), {"config.json is not valid JSON", "ill-formed UTF-8 byte"});
  write_bytes(dir / "config.json", "");
  expect_refused(dir.path(), {"config.json is not valid JSON"});
  fs::remove(dir / "config.json");
  fs::create_directory(dir / "config.json");
  expect_refused(dir.path(), {"config.json is not a regular file"});
}

TEST(Checkpoint, RefusesAWrongIndex) {
  const TempDirectory dir;
  write_sharded(dir.path());
  const fs::path index = dir / "model.safetensors.index.json";
  write_bytes(index, "[]");
  expect_refused(dir.path(), {"holds a JSON array"});
  write_bytes(index, "{}");
  expect_refused(dir.path(), {"has no \"weight_map\" that is an object"});
  write_bytes(index, R"({"weight_map": ["a"]})");
  expect_refused(dir.path(), {"has no \"weight_map\" that is an object"});
  write_bytes(index, R"({"weight_map": {"a": 1}})");
  expect_refused(dir.path(), {"maps \"a\" to something that is not a file name"});
  write_bytes(index, R"({"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}})");
  expect_refused(dir.path(), {"has the key \"a\" twice"});
}

TEST(Checkpoint, RefusesShardNamesThatLeaveTheDirectory) {
  const TempDirectory dir;
  fs::create_directory(dir / "inner");
  json index = write_sharded(dir / "inner");
  save_safetensors(dir / "outside.safetensors", {{"a", at::ones({2})}});
  for (const std::string& name : {std::string("../outside.safetensors"), (dir / "outside.safetensors").string(),
                                  std::string("sub/one.safetensors"), std::string(".."), std::string("."),
                                  std::string(), std::string("one.safetensors\0x", 17)}) {
    index["weight_map"]["a"] = name;
    write_bytes(dir / "inner/model.safetensors.index.json", index.dump());
    expect_refused(dir / "inner", {"expected the plain name of a file in the same directory"});
  }
}

TEST(Checkpoint, NamesEveryMissingShard) {
  const TempDirectory dir;
  json index = write_sharded(dir.path());
  index["weight_map"]["x"] = "three.safetensors";
  index["weight_map"]["y"] = "four.safetensors";
  write_bytes(dir / "model.safetensors.index.json", index.dump());
  expect_refused(dir.path(),
                 {"lacks 2 of 4 files", "\"four.safetensors\", \"three.safetensors\"", "incomplete download?"});
}

TEST(Checkpoint, NamesTenMissingTensorsAndCountsTheRest) {
  const TempDirectory dir;
  json index = write_sharded(dir.path());
  index["weight_map"]["x"] = "one.safetensors";
  write_bytes(dir / "model.safetensors.index.json", index.dump());
  expect_refused(dir.path(), {"lacks 1 of 4 tensors that its index names: \"x\";"});
  for (int i = 10; i < 23; ++i) {
    index["weight_map"][c10::str("x", i)] = "two.safetensors";
  }
  write_bytes(dir / "model.safetensors.index.json", index.dump());
  expect_refused(dir.path(), {"lacks 14 of 17 tensors", "\"x\", \"x10\"", "\"x18\" and 4 more;"});
}

TEST(Checkpoint, NamesTheShardThatIsDamaged) {
  const TempDirectory dir;
  write_sharded(dir.path());
  fs::resize_file(dir / "two.safetensors", fs::file_size(dir / "two.safetensors") - 1);
  expect_refused(dir.path(), {"two.safetensors", "incomplete download?"});
}

}  // namespace
}  // namespace baseq
