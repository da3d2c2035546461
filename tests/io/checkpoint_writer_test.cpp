#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <gtest/gtest.h>

#include "baseq/io/checkpoint.h"
#include "one_tensor_checkpoint.h"
#include "temp_directory.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::expect_error;
using test::kConfig;
using test::list;
using test::read_bytes;
using test::TempDirectory;
using test::value_of;
using test::write_bytes;
using test::write_checkpoint;
using Names = std::vector<std::string>;

TEST(CheckpointWriter, WritesOneFile) {
  const TempDirectory dir;
  write_checkpoint(dir / "out", 5);
  EXPECT_EQ(list(dir.path()), Names{"out"});
  EXPECT_EQ(list(dir / "out"), (Names{"config.json", "model.safetensors"}));
  EXPECT_EQ(read_bytes(dir / "out/config.json"), "{\n  \"hidden_size\": 8\n}\n");
  EXPECT_EQ(value_of(dir / "out"), 5);
  EXPECT_EQ(SafetensorsFile(dir / "out/model.safetensors").metadata(),
            (std::map<std::string, std::string>{{"baseq", "weights"}, {"format", "pt"}}));
}

TEST(CheckpointWriter, WritesShardsThatReadBack) {
  const TempDirectory dir;
  std::map<std::string, Tensor> tensors;
  {
    CheckpointWriter writer(dir / "out", {.shard_bytes = 100});
    for (int i = 0; i < 7; ++i) {  // 48 bytes each: two to a shard
      const std::string name = c10::str("t", i);
      tensors[name] = at::arange(12, at::kFloat) + i;
      writer.add(name, tensors[name]);
    }
    writer.finish(kConfig);
  }
  EXPECT_EQ(list(dir / "out"), (Names{"config.json", "model-00001-of-00004.safetensors",
                                      "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors",
                                      "model-00004-of-00004.safetensors", "model.safetensors.index.json"}));
  const Checkpoint checkpoint(dir / "out");
  EXPECT_EQ(checkpoint.names().size(), 7U);
  for (const auto& [name, tensor] : tensors) {
    EXPECT_TRUE(at::equal(checkpoint.tensor(name), tensor)) << name;
  }
  EXPECT_EQ(read_bytes(dir / "out/model.safetensors.index.json"), R"({
  "metadata": {
    "total_size": 336
  },
  "weight_map": {
    "t0": "model-00001-of-00004.safetensors",
    "t1": "model-00001-of-00004.safetensors",
    "t2": "model-00002-of-00004.safetensors",
    "t3": "model-00002-of-00004.safetensors",
    "t4": "model-00003-of-00004.safetensors",
    "t5": "model-00003-of-00004.safetensors",
    "t6": "model-00004-of-00004.safetensors"
  }
}
)");
}

TEST(CheckpointWriter, SameTensorsGiveTheSameBytes) {
  const TempDirectory dir;
  for (const char* name : {"one", "two"}) {
    CheckpointWriter writer(dir / name, {.shard_bytes = 100});
    for (int i = 0; i < 9; ++i) {
      writer.add(c10::str("t", i), at::full({11}, i, i % 2 ? at::kHalf : at::kFloat));
    }
    writer.finish(kConfig);
  }
  ASSERT_EQ(list(dir / "one"), list(dir / "two"));
  for (const std::string& name : list(dir / "one")) {
    EXPECT_EQ(read_bytes(dir / "one" / name), read_bytes(dir / "two" / name)) << name;
  }
}

/// Bytes that this process has handed to write() and its like.
int64_t bytes_written() {
  std::istringstream io(read_bytes("/proc/self/io"));
  std::string key;
  for (int64_t value = 0; io >> key >> value;) {
    if (key == "wchar:") return value;
  }
  return -1;
}

TEST(CheckpointWriter, WhatIsExpectedIsWrittenOnceAndWhatIsNotTwiceToTheSameBytes) {
  const TempDirectory dir;
  std::vector<CheckpointWriter::Expected> all;
  std::vector<Tensor> tensors;
  for (int i = 0; i < 9; ++i) {
    tensors.push_back(at::full({i % 3 == 0 ? 70001 : 50000}, i, i % 2 ? at::kChar : at::kFloat));
    all.push_back({c10::str("t", i),
                   {tensors.back().scalar_type(), tensors.back().sizes().vec()},
                   i == 4 ? "sub/x.safetensors" : ""});
  }
  const auto written = [&](const char* name, const std::vector<CheckpointWriter::Expected>& expected) {
    const int64_t before = bytes_written();
    CheckpointWriter writer(dir / name, {.shard_bytes = 500000});
    writer.expect(expected);
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (all[i].file.empty()) {
        writer.add(all[i].name, tensors[i]);
      } else {
        writer.add_beside(all[i].file, all[i].name, tensors[i]);
      }
    }
    writer.finish(kConfig);
    return bytes_written() - before;
  };
  const int64_t twice = written("nothing", {}), once = written("all", all);
  EXPECT_LT(once, 0.55 * static_cast<double>(twice));
  auto wrong = all;
  wrong[1].info.dtype = at::kFloat;  // its neighbours lie elsewhere, and so does the cut between the shards
  wrong[6].info.shape = {7};
  wrong[7].name = "never";
  std::swap(wrong[2], wrong[8]);
  written("wrong", wrong);
  written("more", [&] {
    auto more = all;
    more.insert(more.begin() + 3, {"never", {at::kHalf, {1000}}});
    return more;
  }());
  written("fewer", {all.begin(), all.end() - 2});
  ASSERT_EQ(list(dir / "all").size(), 7U);
  for (const char* other : {"all", "wrong", "more", "fewer"}) {
    ASSERT_EQ(list(dir / other), list(dir / "nothing"));
    for (const std::string& name : list(dir / other)) {
      if (name == "sub") continue;
      EXPECT_TRUE(read_bytes(dir / other / name) == read_bytes(dir / "nothing" / name)) << other << " " << name;
    }
    EXPECT_TRUE(read_bytes(dir / other / "sub/x.safetensors") == read_bytes(dir / "nothing/sub/x.safetensors"))
        << other;
  }
}

TEST(CheckpointWriter, WritesATensorWhenItIsAdded) {
  const TempDirectory dir;
  CheckpointWriter writer(dir / "out", {});
  const Tensor tensor = at::full({4}, 5);
  writer.add("a", tensor);
  tensor.fill_(6);
  writer.finish(kConfig);
  EXPECT_EQ(value_of(dir / "out"), 5);
}

TEST(CheckpointWriter, CopiesSideFilesThatAreData) {
  const TempDirectory dir;
  const fs::path source = dir / "source";
  fs::create_directories(source / "original");
  std::string binary;
  for (int i = 0; i < 3'000'000; ++i) {
    binary += static_cast<char>(i * 7 + i / 256);
  }
  write_bytes(source / "tokenizer.json", binary);
  write_bytes(source / "empty.txt", "");
  write_bytes(source / ".gitattributes", "x");
  write_bytes(source / "generation_config.json", "{}");
  write_bytes(source / "tokenizer_config.json", "old");
  for (const char* name : {"model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "m.gguf", "config.json",
                           "model.safetensors.index.json", "pytorch_model.bin.index.json"}) {
    write_bytes(source / name, "weights");
  }
  write_bytes(source / "original/params.json", "{}");
  write_bytes(source / "evil.py", "import os");
  write_bytes(source / "processor_config.json", R"({"auto_map": {"AutoProcessor": "evil.P"}, "size": 8})");
  write_bytes(dir / "secret", "key");
  fs::create_symlink("../secret", source / "secret.txt");
  write_bytes(source / "original/vocab.txt", "vocabulary");
  fs::create_symlink("original/vocab.txt", source / "vocab.txt");
  fs::permissions(source / "generation_config.json", fs::perms::owner_read);
  CheckpointWriter writer(dir / "out", {});
  writer.add("a", at::ones({4}));
  writer.write_file("tokenizer_config.json", "new");
  writer.copy_side_files(source);
  writer.write_file("generation_config.json", "{\"a\":1}");
  writer.finish(kConfig);
  EXPECT_EQ(list(dir / "out"),
            (Names{".gitattributes", "config.json", "empty.txt", "generation_config.json", "model.safetensors",
                   "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}));
  EXPECT_EQ(json::parse(read_bytes(dir / "out/processor_config.json")), (json{{"size", 8}}));
  EXPECT_EQ(read_bytes(dir / "out/tokenizer.json"), binary);
  EXPECT_EQ(read_bytes(dir / "out/empty.txt"), "");
  EXPECT_EQ(read_bytes(dir / "out/vocab.txt"), "vocabulary");
  EXPECT_FALSE(fs::is_symlink(dir / "out/vocab.txt"));
  EXPECT_EQ(read_bytes(dir / "out/tokenizer_config.json"), "new");
  EXPECT_EQ(read_bytes(dir / "out/generation_config.json"), "{\"a\":1}");
  EXPECT_EQ(value_of(dir / "out"), 1);
}

TEST(CheckpointWriter, LeavesOutNamedSideFiles) {
  const TempDirectory dir;
  fs::create_directory(dir / "source");
  write_bytes(dir / "source/log.jsonl", "x");
  write_bytes(dir / "source/tokenizer.json", "{}");
  CheckpointWriter writer(dir / "out", {});
  writer.add("a", at::ones({4}));
  writer.copy_side_files(dir / "source", {"log.jsonl"});
  writer.finish(kConfig);
  EXPECT_EQ(list(dir / "out"), (Names{"config.json", "model.safetensors", "tokenizer.json"}));
}

TEST(CheckpointWriter, WhatTheCheckRefusesGetsNoName) {
  const TempDirectory dir;
  {
    CheckpointWriter writer(dir / "out", {.shard_bytes = 16});
    writer.add("a", at::ones({4}));
    writer.add("b", at::zeros({4}));
    expect_error(
        [&] {
          writer.finish(kConfig, [&](const Checkpoint& written) {
            EXPECT_EQ(written.config(), kConfig);
            EXPECT_TRUE(at::equal(written.tensor("a"), at::ones({4})));
            EXPECT_TRUE(at::equal(written.tensor("b"), at::zeros({4})));
            EXPECT_FALSE(fs::exists(dir / "out"));
            TORCH_CHECK(false, "b is wrong");
          });
        },
        {"b is wrong"});
  }
  EXPECT_TRUE(list(dir.path()).empty());
}

TEST(CheckpointWriter, FilesOfASubdirectoryAreNoPartOfTheCheckpoint) {
  const TempDirectory dir;
  CheckpointWriter writer(dir / "out", {});
  const std::string adapter = "adapter/adapter_model.safetensors";
  writer.add_beside(adapter, "b", at::full({2}, 3.0F));
  writer.add("a", at::ones({4}));
  writer.add_beside(adapter, "a", at::arange(5, at::kByte));
  writer.write_file("adapter/adapter_config.json", "{}");
  writer.finish(kConfig, [&](const Checkpoint& written) {
    EXPECT_EQ(written.names(), Names{"a"});
    EXPECT_TRUE(fs::exists(written.path() / "adapter/adapter_config.json"));
  });
  EXPECT_EQ(list(dir / "out/adapter"), (Names{"adapter_config.json", "adapter_model.safetensors"}));
  const SafetensorsFile written(dir / "out" / adapter);
  EXPECT_TRUE(at::equal(written.tensor("b"), at::full({2}, 3.0F)));
  EXPECT_TRUE(at::equal(written.tensor("a"), at::arange(5, at::kByte)));
}

TEST(CheckpointWriter, RefusesWhatWouldMakeAWrongCheckpoint) {
  const TempDirectory dir;
  fs::create_directory(dir / "source");
  fs::create_symlink("nowhere", dir / "source/tokenizer.json");
  CheckpointWriter writer(dir / "out", {.shard_bytes = 1});
  expect_error([&] { writer.copy_side_files(dir / "source"); }, {"tokenizer.json: is a link to nothing"});
  expect_error([&] { writer.copy_side_files(dir / "absent"); }, {"cannot read", "absent"});
  expect_error([&] { writer.finish(kConfig); }, {"would have no tensors"});
  expect_error([&] { writer.finish(json::array()); }, {"JSON array, expected an object"});
  expect_error([&] { writer.finish({{"a", "\xff"}}); }, {"config.json", "invalid UTF-8"});
  writer.add("a", at::ones({4}));
  expect_error([&] { writer.add("a", at::ones({4})); }, {"tensor \"a\" was added before"});
  expect_error([&] { writer.add("b", Tensor()); }, {"tensor \"b\" is undefined"});
  for (const char* name : {"", ".", "..", "../x", "/tmp/x", "sub/", "sub/..", "a/b/x"}) {
    expect_error([&] { writer.write_file(name, ""); }, {"is not the plain name of a file"});
  }
  for (const char* name : {"x.safetensors", "../x.safetensors", "a/b/x.safetensors", "sub/x"}) {
    expect_error([&] { writer.add_beside(name, "a", at::ones({4})); }, {"checkpoint writer: ", name});
  }
  writer.add_beside("sub/x.safetensors", "a", at::ones({4}));
  expect_error([&] { writer.add_beside("sub/x.safetensors", "a", at::ones({4})); }, {"\"a\"", "was added before"});
  for (const char* name : {"config.json", "model.safetensors", "x.index.json", "sub/y.safetensors"}) {
    expect_error([&] { writer.write_file(name, ""); }, {"is kept for weights and config.json"});
  }
  writer.finish(kConfig);
  expect_error([&] { writer.add("c", at::ones({4})); }, {"is finished"});
  expect_error([&] { writer.write_file("c", ""); }, {"is finished"});
  expect_error([&] { writer.copy_side_files(dir / "source"); }, {"is finished"});
  expect_error([&] { writer.finish(kConfig); }, {"is finished"});
  expect_error([&] { CheckpointWriter bad(dir / "bad", {.shard_bytes = 0}); }, {"shard_bytes is 0"});
  EXPECT_EQ(list(dir.path()), (Names{"out", "source"}));
}

}  // namespace
}  // namespace baseq
