#include "io/output_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "temp_directory.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::expect_error;
using test::list;
using test::read_bytes;
using test::TempDirectory;
using test::write_bytes;
using Names = std::vector<std::string>;

constexpr const char* kMark = "ours";

void check(const fs::path& path) { check_output_file("--x", path, kMark); }

TEST(OutputFile, IsWrittenAsAWholeAndReplaced) {
  const TempDirectory dir;
  write_output_file(dir / "a", "one");
  write_output_file(dir / "a", "two");
  EXPECT_EQ(read_bytes(dir / "a"), "two");
  EXPECT_EQ(list(dir.path()), Names{"a"});
}

TEST(OutputFile, ALinkIsFollowedAlsoToAFileThatDoesNotExistYet) {
  const TempDirectory dir;
  fs::create_directory(dir / "sub");
  write_bytes(dir / "sub/real", "before");
  fs::create_symlink("sub/real", dir / "link");
  fs::create_symlink("link", dir / "second");
  fs::create_symlink("sub/new", dir / "dangling");
  write_output_file(dir / "second", "after");
  write_output_file(dir / "dangling", "new");
  EXPECT_EQ(read_bytes(dir / "sub/real"), "after");
  EXPECT_EQ(read_bytes(dir / "sub/new"), "new");
  for (const char* name : {"link", "second", "dangling"}) EXPECT_TRUE(fs::is_symlink(dir / name)) << name;
  EXPECT_EQ(list(dir / "sub"), (Names{"new", "real"}));
  fs::create_symlink("circle", dir / "circle");
  expect_error([&] { write_output_file(dir / "circle", ""); }, {"circle", "symbolic links"});
}

TEST(OutputFile, APipeIsWrittenThroughAndStaysOne) {
  const TempDirectory dir;
  ASSERT_EQ(::mkfifo((dir / "pipe").c_str(), 0600), 0);
  std::string got;
  std::thread reader([&] { got = read_bytes(dir / "pipe"); });
  check(dir / "pipe");
  write_output_file(dir / "pipe", "through");
  reader.join();
  EXPECT_EQ(got, "through");
  EXPECT_TRUE(fs::is_fifo(dir / "pipe"));
  EXPECT_EQ(list(dir.path()), Names{"pipe"});
}

TEST(OutputFile, AnOpenFileOfThisProcessIsWrittenWhereItStands) {
  const TempDirectory dir;
  write_bytes(dir / "a", "");
  const int descriptor = ::open((dir / "a").c_str(), O_RDWR);
  ASSERT_GE(descriptor, 0);
  ASSERT_EQ(::write(descriptor, "first ", 6), 6);
  const fs::path name = "/dev/fd/" + std::to_string(descriptor);
  check(name);
  EXPECT_TRUE(same_output_file(name, "/proc/self/fd/" + std::to_string(descriptor)));
  write_output_file(name, "second");
  EXPECT_EQ(read_bytes(dir / "a"), "first second");
  ::close(descriptor);
  const int read_only = ::open((dir / "a").c_str(), O_RDONLY);
  expect_error([&] { check("/dev/fd/" + std::to_string(read_only)); }, {"--x: cannot write", "Bad file descriptor"});
  ::close(read_only);
}

TEST(OutputFile, ASecondWriterIsRefusedAndWhatADeadOneLeftIsNot) {
  const TempDirectory dir;
  write_bytes(dir / "a.baseq.tmp", "half");
  const int other = ::open((dir / "a.baseq.tmp").c_str(), O_RDWR);
  ASSERT_EQ(::flock(other, LOCK_EX | LOCK_NB), 0);
  expect_error([&] { write_output_file(dir / "a", "mine"); }, {"another process is writing", "a"});
  EXPECT_EQ(read_bytes(dir / "a.baseq.tmp"), "half");
  ::close(other);
  write_output_file(dir / "a", "mine");
  EXPECT_EQ(list(dir.path()), Names{"a"});
  EXPECT_EQ(read_bytes(dir / "a"), "mine");
}

TEST(OutputFile, OnlyWhatThisProgramWroteIsReplaced) {
  const TempDirectory dir;
  check(dir / "new");
  write_bytes(dir / "empty", "");
  check(dir / "empty");
  write_bytes(dir / "ours", "{\"ours\": 1}");
  check(dir / "ours");
  write_bytes(dir / "foreign", "{\"theirs\": 1}");
  write_bytes(dir / "late", std::string(512, ' ') + "ours");
  fs::create_symlink("foreign", dir / "link");
  for (const char* name : {"foreign", "late", "link"}) {
    expect_error([&] { check(dir / name); }, {"--x", name, "exists", "not a result that baseq wrote"});
  }
}

TEST(OutputFile, WhatCannotBeWrittenIsFoundBeforeTheWork) {
  const TempDirectory dir;
  fs::create_directory(dir / "sub");
  write_bytes(dir / "file", "ours");
  expect_error([&] { check(dir / "no/a"); }, {"--x: cannot write", "no/a", "No such file"});
  expect_error([&] { check(dir / "sub"); }, {"--x: cannot write", "sub", "Is a directory"});
  expect_error([&] { check(dir / "file/a"); }, {"--x: cannot write", "file/a", "Not a directory"});
  EXPECT_EQ(list(dir.path()), (Names{"file", "sub"}));
  expect_error([&] { check_disk_space("export", dir / "no/such/a", INT64_MAX); }, {"will be written but"});
  check_disk_space("export", dir / "no/such/a", 1);
}

TEST(OutputFile, NamesOfOneFileAreKnown) {
  const TempDirectory dir;
  fs::create_symlink("a", dir / "link");
  EXPECT_TRUE(same_output_file(dir / "link", dir / "." / "a"));
  EXPECT_FALSE(same_output_file(dir / "a", dir / "b"));
  EXPECT_FALSE(same_output_file("/dev/null", "/dev/null"));
  EXPECT_FALSE(same_output_file(dir / "a", "/dev/stdout"));
}

}  // namespace
}  // namespace baseq
