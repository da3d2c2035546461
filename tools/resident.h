#pragma once

#include <string>

#include "baseq/model/decoder.h"
#include "baseq/runtime/generate.h"

namespace baseq::cli {

/// Throws unless the weights of a model that stays in memory and `sequences` caches of `context` tokens fit in what
/// memory is free; reads no tensor.
void check_resident_memory(const std::string& name, const Model& model, const LoadOptions& options, int64_t context,
                           int64_t sequences = 1);

/// The model in memory, and nothing of what was needed to read it.
Decoder load_resident(const Model& model, const LoadOptions& options);

}  // namespace baseq::cli
