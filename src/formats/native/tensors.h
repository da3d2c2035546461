#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/config.h"
#include "baseq/model/site.h"
#include "baseq/model/stored_model.h"

/// The online transforms of a native checkpoint. Factor k of a chain is the tensors `<block>.<point>.transform.<k>.*`,
/// see docs/format.md. Not installed.
namespace baseq {

/// Kinds of the factors of each chain that is there, by block and site.
using OnlineKinds = std::map<std::pair<int64_t, Site>, std::vector<Factor::Kind>>;

/// From the names alone; from `hadamards` in versions that have no such names. Throws c10::Error naming the tensor for
/// a point without an online transform, an unknown or incomplete factor, a gap in a chain, and what is reserved.
OnlineKinds find_transforms(const Checkpoint& checkpoint, const ModelConfig& config,
                            const QuantizationConfig& quantization);

/// The names that the tensors of a chain may have; those of inverses need not be there.
/// @param prefix such as "model.layers.0."
std::vector<std::string> transform_names(const std::string& prefix, Site site, const std::vector<Factor::Kind>& kinds);

/// A chain as find_transforms found it, float32 on the CPU. Throws c10::Error naming the tensor whose dtype, shape or
/// values are no factor of `width` features.
Transform read_transform(const Checkpoint& checkpoint, const std::string& prefix, Site site,
                         const std::vector<Factor::Kind>& kinds, int64_t width);

}  // namespace baseq
