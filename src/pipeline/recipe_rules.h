#pragma once

#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Throws c10::Error for grids that are not of the kind that Grids names.
void check_grids(const Grids& grids, const std::string& path);

/// Throws c10::Error for what the order of the steps makes impossible, and for grids that no step uses.
/// @param path       how errors name the recipe
/// @param step_paths how they name each step of each pass
void check_steps(const Recipe& recipe, const std::string& path,
                 const std::vector<std::vector<std::string>>& step_paths);

/// How recipes name a kind of transform.
std::string transform_name(TransformStep::Kind kind);

}  // namespace baseq
