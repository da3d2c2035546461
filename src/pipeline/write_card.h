#pragma once

#include <string>

#include "baseq/io/checkpoint.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// The README.md of a checkpoint that `recipe` makes of `source`; empty where the source's own is too long to join.
/// @param windows     of calibration; undefined: none
/// @param in_python   whether it runs in transformers with the file that it holds
std::string quantized_card(const Checkpoint& source, const Recipe& recipe, const Tensor& windows, bool in_python);

}  // namespace baseq
