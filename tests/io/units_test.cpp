#include "io/units.h"

#include <gtest/gtest.h>

namespace baseq {
namespace {

constexpr int64_t kKibi = 1024, kMebi = kKibi * 1024, kGibi = kMebi * 1024;

TEST(Units, BytesHaveTheLargestUnitOfWhichThereIsOneAndGibibytesFromTenOn) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(kKibi - 1), "1023 B");
  EXPECT_EQ(format_bytes(kKibi), "1 KiB");
  EXPECT_EQ(format_bytes(6364 * kKibi), "6.2 MiB");
  EXPECT_EQ(format_bytes(10 * kMebi), "10.0 MiB");
  EXPECT_EQ(format_bytes(9 * kGibi), "9216.0 MiB");
  EXPECT_EQ(format_bytes(12 * kGibi + kGibi / 4), "12.25 GiB");
}

TEST(Units, SecondsBecomeMinutesAndHours) {
  EXPECT_EQ(format_seconds(0.04), "0.0 s");
  EXPECT_EQ(format_seconds(59.94), "59.9 s");
  EXPECT_EQ(format_seconds(247.9), "4:07 min");
  EXPECT_EQ(format_seconds(3723), "1:02:03 h");
}

}  // namespace
}  // namespace baseq
