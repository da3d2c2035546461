#pragma once

#include <functional>
#include <string>
#include <vector>

#include "open_block.h"

namespace baseq {

/// A linear that is rounded, and what there is to say about it.
struct RoundedLinear {
  WeightState state;
  std::vector<ProgressEvent> events;
};

/// Rounds linears of a block that do not depend on each other, each by one process, and adds them to the block.
/// @param round rounds one and adds it to `block`
void round_divided(const std::vector<std::string>& names, OpenBlock& block, const BlockTask& task,
                   const std::function<RoundedLinear(const std::string& name)>& round);

}  // namespace baseq
