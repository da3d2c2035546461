#pragma once

#include <cstdint>
#include <vector>

#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Blocks that learn together: those from `begin` up to `end`.
struct BlockWindow {
  int64_t begin = 0, end = 0;
};

/// The windows of a pass over blocks in their order. Neither begins nor ends go back, and every block is in one.
std::vector<BlockWindow> block_windows(const Pass& pass, int64_t num_blocks);

/// Streams of activations that a run holds: the two, what comes after a block, and after a window.
int64_t num_streams(const Recipe& recipe);

/// The most blocks that one of its windows has, in a model that is large enough.
int64_t largest_window(const Pass& pass);

/// A step of a pass when it is the turn of a block: it works on the blocks from that one up to `end`.
struct PlacedStep {
  const Step* step;
  int64_t end;
};

/// What is done when it is the turn of a block, in order. Without windows of several blocks these are the steps of the
/// pass. Else they are, for each window that begins there, its learn steps; then the rest, on this block alone.
/// @param pass over blocks; must outlive the result
std::vector<PlacedStep> steps_at(const Pass& pass, int64_t block, int64_t num_blocks);

}  // namespace baseq
