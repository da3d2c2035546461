#include "block_windows.h"

#include <algorithm>

namespace baseq {
namespace {

/// Sizes up to which SliderQuant's windows grow and from which they shrink.
constexpr int64_t kSliderSize = 4;

std::vector<BlockWindow> fixed_windows(int64_t size, int64_t stride, int64_t num_blocks) {
  std::vector<BlockWindow> windows;
  for (int64_t begin = 0; windows.empty() || windows.back().end < num_blocks; begin += stride) {
    windows.push_back({begin, std::min(begin + size, num_blocks)});
  }
  return windows;
}

/// The pairs begin at the last block of the largest window at the start and end at the first one of that at the end.
std::vector<BlockWindow> slider_windows(int64_t num_blocks) {
  const int64_t size = std::clamp<int64_t>(num_blocks / 2, 1, kSliderSize);
  std::vector<BlockWindow> windows;
  for (int64_t end = 1; end <= size; ++end) windows.push_back({0, end});
  for (int64_t begin = size - 1; begin < num_blocks - size; ++begin) windows.push_back({begin, begin + 2});
  for (int64_t begin = num_blocks - size; begin < num_blocks && num_blocks > 1; ++begin) {
    windows.push_back({begin, num_blocks});
  }
  return windows;
}

}  // namespace

std::vector<BlockWindow> block_windows(const Pass& pass, int64_t num_blocks) {
  if (pass.windows == Pass::Windows::kSlider) return slider_windows(num_blocks);
  return fixed_windows(pass.window, pass.stride, num_blocks);
}

int64_t num_streams(const Recipe& recipe) {
  return std::ranges::any_of(recipe.passes, [](const Pass& pass) { return pass.in_windows(); }) ? 4 : 3;
}

int64_t largest_window(const Pass& pass) {
  if (!pass.in_windows()) return 1;
  return pass.windows == Pass::Windows::kSlider ? kSliderSize : pass.window;
}

std::vector<PlacedStep> steps_at(const Pass& pass, int64_t block, int64_t num_blocks) {
  std::vector<PlacedStep> placed;
  const auto add = [&](int64_t end, const auto& is_meant) {
    for (const Step& step : pass.steps) {
      if (is_meant(step)) placed.push_back({&step, end});
    }
  };
  const auto learns = [](const Step& step) { return std::holds_alternative<LearnStep>(step); };
  if (!pass.in_windows()) {
    add(block + 1, [](const Step&) { return true; });
    return placed;
  }
  for (const BlockWindow& window : block_windows(pass, num_blocks)) {
    if (window.begin == block) add(window.end, learns);
  }
  add(block + 1, [&](const Step& step) { return !learns(step); });
  return placed;
}

}  // namespace baseq
