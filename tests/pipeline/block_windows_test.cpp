#include "pipeline/block_windows.h"

#include <gtest/gtest.h>

#include <utility>

namespace baseq {
namespace {

using Pairs = std::vector<std::pair<int64_t, int64_t>>;

Pass pass_of(int64_t window, int64_t stride) {
  Pass pass;
  pass.window = window;
  pass.stride = stride;
  return pass;
}

Pass slider() {
  Pass pass;
  pass.windows = Pass::Windows::kSlider;
  return pass;
}

/// First and last block of each window.
Pairs windows(const Pass& pass, int64_t num_blocks) {
  Pairs found;
  for (const BlockWindow& window : block_windows(pass, num_blocks)) found.emplace_back(window.begin, window.end - 1);
  return found;
}

TEST(BlockWindows, OfAFixedSizeBeginAtEveryStride) {
  EXPECT_EQ(windows(pass_of(1, 1), 3), (Pairs{{0, 0}, {1, 1}, {2, 2}}));
  EXPECT_EQ(windows(pass_of(2, 1), 4), (Pairs{{0, 1}, {1, 2}, {2, 3}}));
  EXPECT_EQ(windows(pass_of(2, 2), 5), (Pairs{{0, 1}, {2, 3}, {4, 4}}));
  EXPECT_EQ(windows(pass_of(3, 2), 6), (Pairs{{0, 2}, {2, 4}, {4, 5}}));
  EXPECT_EQ(windows(pass_of(8, 3), 6), (Pairs{{0, 5}}));
}

TEST(BlockWindows, OfTheSliderGrowSlideAndShrink) {
  EXPECT_EQ(windows(slider(), 12), (Pairs{{0, 0},
                                          {0, 1},
                                          {0, 2},
                                          {0, 3},
                                          {3, 4},
                                          {4, 5},
                                          {5, 6},
                                          {6, 7},
                                          {7, 8},
                                          {8, 11},
                                          {9, 11},
                                          {10, 11},
                                          {11, 11}}));
  // Of a small model they grow over half of the blocks.
  EXPECT_EQ(windows(slider(), 6), (Pairs{{0, 0}, {0, 1}, {0, 2}, {2, 3}, {3, 5}, {4, 5}, {5, 5}}));
  EXPECT_EQ(windows(slider(), 2), (Pairs{{0, 0}, {0, 1}, {1, 1}}));
  EXPECT_EQ(windows(slider(), 1), (Pairs{{0, 0}}));
}

TEST(BlockWindows, GoForwardOverAllBlocks) {
  std::vector<Pass> passes = {slider()};
  for (int64_t window = 1; window <= 5; ++window) {
    for (int64_t stride = 1; stride <= window; ++stride) passes.push_back(pass_of(window, stride));
  }
  for (const Pass& pass : passes) {
    for (int64_t num_blocks = 1; num_blocks <= 14; ++num_blocks) {
      const std::vector<BlockWindow> found = block_windows(pass, num_blocks);
      BlockWindow before;
      for (const BlockWindow& window : found) {
        EXPECT_LT(window.begin, window.end);
        EXPECT_LE(window.end - window.begin, largest_window(pass));
        EXPECT_GE(window.begin, before.begin);
        EXPECT_GE(window.end, before.end);
        EXPECT_LE(window.begin, before.end);
        before = window;
      }
      EXPECT_EQ(found.front().begin, 0);
      EXPECT_EQ(found.back().end, num_blocks);
    }
  }
}

TEST(BlockWindows, PlaceTheStepsOfTheirBlocks) {
  Pass pass = pass_of(3, 2);
  pass.steps = {LearnStep{}, LearnStep{}, RoundStep{}};
  const auto placed = [&](int64_t block) {
    Pairs found;  // index and last block
    for (const PlacedStep& step : steps_at(pass, block, 6))
      found.emplace_back(step.step - pass.steps.data(), step.end - 1);
    return found;
  };
  EXPECT_EQ(placed(0), (Pairs{{0, 2}, {1, 2}, {2, 0}}));
  EXPECT_EQ(placed(1), (Pairs{{2, 1}}));
  EXPECT_EQ(placed(4), (Pairs{{0, 5}, {1, 5}, {2, 4}}));
  EXPECT_EQ(placed(5), (Pairs{{2, 5}}));
  pass.windows = Pass::Windows::kSlider;
  EXPECT_EQ(placed(0), (Pairs{{0, 0}, {1, 0}, {0, 1}, {1, 1}, {0, 2}, {1, 2}, {2, 0}}));
  pass = pass_of(1, 1);
  pass.steps = {TransformStep{}, LearnStep{}, RoundStep{}, LearnStep{}};
  EXPECT_EQ(placed(4), (Pairs{{0, 4}, {1, 4}, {2, 4}, {3, 4}}));
}

}  // namespace
}  // namespace baseq
