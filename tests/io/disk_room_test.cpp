#include "io/disk_room.h"

#include <gtest/gtest.h>

#include "temp_directory.h"

namespace baseq {
namespace {

using test::TempDirectory;

TEST(DiskRoom, ADiskIsNamedOnceWithAllThatGoesToIt) {
  const TempDirectory directory;
  EXPECT_TRUE(find_disk_problems({}).empty());
  EXPECT_TRUE(find_disk_problems({{directory / "not/yet/there", 1}}).empty());
  constexpr int64_t kHuge = int64_t{1} << 60;
  const std::vector<std::string> problems = find_disk_problems({{directory / "a", kHuge}, {directory / "b", kHuge}});
  ASSERT_EQ(problems.size(), 1U);
  EXPECT_EQ(problems[0].find(directory.path().string() + ": 2147483648.00 GiB will be written but "), 0U)
      << problems[0];
}

}  // namespace
}  // namespace baseq
