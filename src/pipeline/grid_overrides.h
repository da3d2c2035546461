#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "baseq/model/config.h"
#include "baseq/pipeline/recipe.h"

/// Grids::overrides and the linears of a model. Not installed.
namespace baseq {

/// Throws c10::Error that begins with `path` where a pattern of GridOverride::linears is empty or no expression.
void check_pattern(const std::string& pattern, const std::string& path);

/// What is wrong with the patterns for this model: those that no linear matches, by name.
std::vector<std::string> unmatched_patterns(const Grids& grids, const ModelConfig& config);

/// The grids of the linears for which an override counts, by full name.
std::map<std::string, std::optional<QuantSpec>> overridden_linears(const Grids& grids, const ModelConfig& config);

/// Types and shapes of the tensors of a block: those of the first one, but for the weights that have another grid. What
/// only has a correction of low rank in later blocks is not known.
/// @param first_block the tensors of block 0 by full name
/// @param dtype       of weights in full precision
std::map<std::string, TensorInfo> infos_of_block(const std::map<std::string, Tensor>& first_block, const Grids& grids,
                                                 const ModelConfig& config, int64_t block, at::ScalarType dtype);

}  // namespace baseq
