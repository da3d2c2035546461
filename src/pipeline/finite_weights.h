#pragma once

#include <string>
#include <vector>

#include "baseq/model/model.h"

namespace baseq {

/// A sentence for each tensor of an original model that holds NaN or an infinity: its name, its block, how many values.
/// Reads every weight once, as fast as memory or the disk gives it, and returns the pages block by block. Tensors that
/// are missing or of integers are left to others.
std::vector<std::string> weights_not_finite(const Checkpoint& checkpoint, const Model& model);

}  // namespace baseq
