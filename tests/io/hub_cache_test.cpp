#include "io/hub_cache.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <optional>

#include "temp_directory.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::TempDirectory;

/// Sets the variables that decide where the cache is, the others unset, and puts all back at the end.
class Environment {
 public:
  explicit Environment(const std::map<std::string, std::string>& values) {
    for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"}) {
      const char* value = std::getenv(name);
      before_[name] = value ? std::optional<std::string>(value) : std::nullopt;
      const auto found = values.find(name);
      set(name, found == values.end() ? std::nullopt : std::optional<std::string>(found->second));
    }
  }
  ~Environment() {
    for (const auto& [name, value] : before_) set(name, value);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  static void set(const std::string& name, const std::optional<std::string>& value) {
    value ? ::setenv(name.c_str(), value->c_str(), 1) : ::unsetenv(name.c_str());
  }
  std::map<std::string, std::optional<std::string>> before_;
};

TEST(HubCache, IsWhereHuggingFaceHubLooks) {
  const std::map<std::string, std::string> all = {{"HF_HUB_CACHE", "/a"},
                                                  {"HUGGINGFACE_HUB_CACHE", "/b"},
                                                  {"HF_HOME", "~/c"},
                                                  {"XDG_CACHE_HOME", "/d"},
                                                  {"HOME", "/home/me"}};
  const auto without = [&](std::initializer_list<const char*> names) {
    auto values = all;
    for (const char* name : names) values.erase(name);
    const Environment environment(values);
    return hub_cache().string();
  };
  EXPECT_EQ(without({}), "/a");
  EXPECT_EQ(without({"HF_HUB_CACHE"}), "/b");
  EXPECT_EQ(without({"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}), "/home/me/c/hub");
  EXPECT_EQ(without({"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"}), "/d/huggingface/hub");
  EXPECT_EQ(without({"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"}),
            "/home/me/.cache/huggingface/hub");
  const Environment empty({{"HF_HUB_CACHE", ""}, {"HOME", "/home/me"}});
  EXPECT_EQ(hub_cache(), "/home/me/.cache/huggingface/hub");
}

TEST(ResolveCheckpoint, FindsTheSnapshotOfMain) {
  const TempDirectory cache;
  const Environment environment({{"HF_HUB_CACHE", cache.path().string()}});
  const fs::path folder = cache / "models--org--tiny.model-1";
  fs::create_directories(folder / "refs");
  fs::create_directories(folder / "snapshots" / "0123abc");
  test::write_bytes(folder / "refs" / "main", "0123abc\n");
  EXPECT_EQ(resolve_checkpoint("org/tiny.model-1"), folder / "snapshots" / "0123abc");
  // A directory of that name comes first, as in transformers.
  EXPECT_EQ(resolve_checkpoint(cache.path().string()), cache.path());

  test::write_bytes(folder / "refs" / "main", "fffff");
  expect_error([] { resolve_checkpoint("org/tiny.model-1"); }, {"snapshots/fffff", "download it again"});
  test::write_bytes(folder / "refs" / "main", "../../elsewhere");
  expect_error([] { resolve_checkpoint("org/tiny.model-1"); }, {"refs/main", "../../elsewhere", "commit"});
  test::write_bytes(folder / "refs" / "main", "");
  expect_error([] { resolve_checkpoint("org/tiny.model-1"); }, {"refs/main", "commit"});
}

TEST(ResolveCheckpoint, FindsARevision) {
  const TempDirectory cache;
  const Environment environment({{"HF_HUB_CACHE", cache.path().string()}});
  const fs::path folder = cache / "models--org--tiny";
  for (const char* commit : {"0123abc", "4567def"}) fs::create_directories(folder / "snapshots" / commit);
  fs::create_directories(folder / "refs" / "refs" / "pr");
  test::write_bytes(folder / "refs" / "main", "0123abc");
  test::write_bytes(folder / "refs" / "v1.0", "4567def");
  test::write_bytes(folder / "refs" / "refs" / "pr" / "1", "4567def");
  for (const char* revision : {"v1.0", "4567def", "refs/pr/1"}) {
    EXPECT_EQ(resolve_checkpoint(std::string("org/tiny@") + revision), folder / "snapshots" / "4567def") << revision;
  }
  EXPECT_EQ(resolve_checkpoint("org/tiny@main"), folder / "snapshots" / "0123abc");
  expect_error([] { resolve_checkpoint("org/tiny@v2"); }, {"org/tiny@v2", "hf download org/tiny --revision v2"});
  for (const char* name : {"org/tiny@", "org/tiny@../x", "org/tiny@a//b", "org/tiny@/etc"}) {
    expect_error([&] { resolve_checkpoint(name); }, {"is not a directory, nor"});
  }
}

TEST(ModelName, IsThatOfTheHubForASnapshotElseTheLastOfThePath) {
  EXPECT_EQ(model_name("/hub/models--org--tiny--model/snapshots/0123abc"), "org/tiny--model");
  EXPECT_EQ(model_name("/hub/models--gpt2/snapshots/0123abc/"), "gpt2");
  EXPECT_EQ(model_name("/hub/snapshots/0123abc"), "0123abc");
  EXPECT_EQ(model_name("/models/tiny/"), "tiny");
  EXPECT_EQ(model_name("models/./tiny"), "tiny");
}

TEST(ResolveCheckpoint, SaysWhereItLooked) {
  const TempDirectory cache;
  const Environment environment({{"HF_HUB_CACHE", cache.path().string()}});
  expect_error([] { resolve_checkpoint("org/absent"); },
               {"org/absent", "neither a directory", cache.path().string(), "hf download org/absent"});
  for (const char* name : {"a/b/c", "/no/such/directory", "../up", "org/", "", "org/../x", "org name/x"}) {
    expect_error([&] { resolve_checkpoint(name); }, {"is not a directory, nor"});
  }
}

}  // namespace
}  // namespace baseq
