#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "io/run_journal.h"
#include "temp_directory.h"

namespace {

/// What was asked of the system, in order: "sync PATH" and "rename PATH".
std::vector<std::string>* recorded = nullptr;

}  // namespace

// The library's calls come here: a program's own functions go before those of the C library.
extern "C" int fsync(int descriptor) {
  if (recorded != nullptr) {
    recorded->push_back("sync " +
                        std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(descriptor)).string());
  }
  return static_cast<int>(::syscall(SYS_fsync, descriptor));
}

extern "C" int rename(const char* from, const char* to) noexcept {
  if (recorded != nullptr) recorded->push_back("rename " + std::string(to));
  return static_cast<int>(::syscall(SYS_rename, from, to));
}

namespace baseq {
namespace {

TEST(Durability, WhatTheJournalNamesIsOnTheDiskBeforeTheJournal) {
  const test::TempDirectory directory;
  std::vector<std::string> calls;
  recorded = &calls;
  {
    RunJournal journal(directory.path(),
                       {.identity = {{"seed", 1}}, .details = {}, .inputs = {{"ids", at::arange(3)}}});
    journal.save_partial({{"x", at::ones(3)}}, {});
    for (int i = 0; i < 2; ++i) journal.finish_step({{"x", at::ones(3)}}, {{"y", at::ones(3)}});
  }
  recorded = nullptr;
  const std::string sync = "sync " + directory.path().string();
  std::vector<std::string> not_durable, published;
  for (const std::string& call : calls) {
    if (call == sync) {
      not_durable.clear();
    } else if (call.starts_with("rename ")) {
      const std::string name = std::filesystem::path(call.substr(7)).filename().string();
      if (name.ends_with(".json")) {
        EXPECT_TRUE(not_durable.empty()) << name << " comes before " << not_durable.front();
        published.push_back(name);
      }
      not_durable.push_back(name);
    }
  }
  EXPECT_TRUE(not_durable.empty()) << not_durable.front();
  EXPECT_EQ(published, (std::vector<std::string>{"run.json", "journal.json", "journal.json", "journal.json"}));
}

}  // namespace
}  // namespace baseq
