#include "io/side_files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>

#include "temp_directory.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::expect_error;
using test::TempDirectory;
using Names = std::vector<std::string>;

void write_bytes(const fs::path& path, std::string_view content) {
  fs::create_directories(path.parent_path());
  test::write_bytes(path, content);
}

Names copied(const SideFiles& files) {
  Names names;
  for (const SideFiles::File& file : files.copied) names.push_back(file.name);
  return names;
}

Names left_out(const SideFiles& files) {
  Names all;
  for (const auto& [reason, names] : files.left_out) all.insert(all.end(), names.begin(), names.end());
  std::sort(all.begin(), all.end());
  return all;
}

TEST(SideFiles, OnlyDataIsCopied) {
  const TempDirectory dir;
  const Names data = {".gitattributes", "LICENSE",        "README.md",       "chat_template.jinja",
                      "merges.txt",     "tokenizer.json", "tokenizer.model", "vocab.tiktoken"};
  const Names foreign = {
      "a.PY",         "engine.plan",       "evil.py", "flax_model.msgpack", "lib.so",      "m.gguf", "model.onnx",
      "optimizer.pt", "pytorch_model.bin", "run.sh",  "state.pkl",          "tf_model.h5", "w.ckpt", "w.pth"};
  for (const Names& names : {data, foreign}) {
    for (const std::string& name : names) write_bytes(dir / name, "x");
  }
  for (const char* name : {"config.json", "model.safetensors", "other.safetensors", "model.safetensors.index.json",
                           "pytorch_model.bin.index.json", "own.py"}) {
    write_bytes(dir / name, "x");
  }
  write_bytes(dir / "custom_generate/generate.py", "x");
  fs::create_directory(dir / ".cache");
  ASSERT_EQ(::mkfifo((dir / "pipe.txt").c_str(), 0600), 0);
  const SideFiles files = find_side_files(dir.path(), {}, {"own.py"});
  EXPECT_EQ(copied(files), data);
  Names expected = foreign;
  expected.insert(expected.end(), {"custom_generate", "pipe.txt"});
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(left_out(files), expected);
  EXPECT_EQ(files.num_bytes(), static_cast<int64_t>(data.size()));
  EXPECT_NE(files.warning().find("not copied to the output: "), std::string::npos);
  EXPECT_NE(files.warning().find("and 5 more"), std::string::npos) << files.warning();
  EXPECT_TRUE(files.problems.empty());
}

TEST(SideFiles, PicklesAndArchivesAreKnownByTheirContent) {
  const TempDirectory dir;
  write_bytes(dir / "a.model", "\x80\x04\x95 pickled");
  write_bytes(dir / "b", "PK\x03\x04 zipped");
  write_bytes(dir / "c.model", "\n\x0e protobuf");
  EXPECT_EQ(copied(find_side_files(dir.path())), Names{"c.model"});
}

TEST(SideFiles, LinksThatStayInTheModelAreFollowed) {
  const TempDirectory dir;
  const fs::path model = dir / "models--org--name", snapshot = model / "snapshots/abc";
  write_bytes(model / "blobs/1234", "vocabulary");
  write_bytes(model / "secret.txt", "secret");
  write_bytes(dir / "id_rsa", "secret");
  write_bytes(dir / "other/blobs/5678", "secret");
  write_bytes(snapshot / "original/tokenizer.model", "inside");
  const std::pair<const char*, const char*> links[] = {
      {"vocab.txt", "../../blobs/1234"}, {"tokenizer.model", "original/tokenizer.model"}, {"a.txt", "../../secret.txt"},
      {"b.txt", "../../../id_rsa"},      {"c.txt", "../../../other/blobs/5678"},          {"d.txt", "../../blobs/away"},
      {"e.txt", "/etc/passwd"}};
  for (const auto& [name, target] : links) fs::create_symlink(target, snapshot / name);
  fs::create_symlink("../../id_rsa", model / "blobs/away");
  const SideFiles files = find_side_files(snapshot);
  EXPECT_EQ(copied(files), (Names{"tokenizer.model", "vocab.txt"}));
  EXPECT_EQ(left_out(files), (Names{"a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "original"}));
  // The same through a link to the directory, as users make them.
  fs::create_directory_symlink(snapshot, dir / "model");
  EXPECT_EQ(copied(find_side_files(dir / "model")), copied(files));
  // A folder of blobs that is itself a link leads away.
  fs::rename(model / "blobs", dir / "elsewhere");
  fs::create_directory_symlink(dir / "elsewhere", model / "blobs");
  EXPECT_EQ(copied(find_side_files(snapshot)), Names{"tokenizer.model"});
}

TEST(SideFiles, ALinkToNothingIsAProblem) {
  const TempDirectory dir;
  fs::create_symlink("nowhere", dir / "tokenizer.json");
  fs::create_symlink("nowhere", dir / "code.py");  // would not be copied anyway
  const SideFiles files = find_side_files(dir.path());
  ASSERT_EQ(files.problems.size(), 1U);
  EXPECT_NE(files.problems[0].find("tokenizer.json: is a link to nothing"), std::string::npos);
  expect_error([&] { find_side_files(dir / "absent"); }, {"cannot read", "absent"});
}

TEST(SideFiles, JsonThatNamesCodeIsCopiedWithoutIt) {
  const TempDirectory dir;
  write_bytes(dir / "tokenizer_config.json", R"({"auto_map": ["evil.Tokenizer", null], "model_max_length": 8})");
  write_bytes(dir / "processor_config.json", R"({"image_processor": {"auto_m\u0061p": {"A": "o/r--evil.P"}, "x": 1}})");
  write_bytes(dir / "generation_config.json", "{ \"eos_token_id\":2 }");
  write_bytes(dir / "vocab.json", R"({"auto_map": 7, "custom_pipelines": 8})");
  write_bytes(dir / "python_only.json", R"({"auto_map": {"A": "evil.B"}, "x": NaN})");
  write_bytes(dir / "adapter_config.json", R"({"base_model_name_or_path": "other/model"})");
  const SideFiles files = find_side_files(dir.path(), {{"auto_map", "evil"}, {"hidden_size", 8}});
  EXPECT_EQ(copied(files),
            (Names{"generation_config.json", "processor_config.json", "tokenizer_config.json", "vocab.json"}));
  EXPECT_EQ(files.copied[0].content, "");
  EXPECT_EQ(json::parse(files.copied[1].content), (json{{"image_processor", {{"x", 1}}}}));
  EXPECT_EQ(json::parse(files.copied[2].content), (json{{"model_max_length", 8}}));
  EXPECT_EQ(files.copied[3].content, "");
  EXPECT_EQ(left_out(files), (Names{"adapter_config.json", "config.json: auto_map", "processor_config.json: auto_map",
                                    "python_only.json", "tokenizer_config.json: auto_map"}));
}

TEST(RemoveCodeReferences, TakesWhatTransformersWouldRun) {
  json config = json::parse(R"({
    "auto_map": "a string", "custom_pipelines": {"task": {"impl": "evil.Pipeline"}},
    "_attn_implementation": "someone/kernel", "attn_implementation": "sdpa",
    "nested": {"deep": [{"auto_map": [], "_experts_implementation": "x/y:z"}]}, "auto_map_of_tokens": 1})");
  EXPECT_EQ(remove_code_references(config),
            (Names{"_attn_implementation", "auto_map", "custom_pipelines", "_experts_implementation"}));
  EXPECT_EQ(config,
            json::parse(R"({"attn_implementation": "sdpa", "nested": {"deep": [{}]}, "auto_map_of_tokens": 1})"));
  EXPECT_TRUE(remove_code_references(config).empty());
  json text = "auto_map";
  EXPECT_TRUE(remove_code_references(text).empty());
}

}  // namespace
}  // namespace baseq
