#pragma once

#include <cstdint>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/runtime/sampler.h"

#pragma GCC visibility push(default)
namespace baseq {

/// What a checkpoint says about how to generate with it.
struct GenerationConfig {
  /// temperature, top_k, top_p, min_p and repetition_penalty of generation_config.json. Without "do_sample" the
  /// temperature is 0, as in transformers; what the file does not say is at the value that changes nothing.
  SamplingOptions sampling{.temperature = 0};
  std::vector<int32_t> eos;  ///< eos_token_id, one or several, of that file or else of config.json
};
/// Throws c10::Error naming the file and the value that is malformed or out of range.
GenerationConfig read_generation_config(const Checkpoint& checkpoint);

}  // namespace baseq
#pragma GCC visibility pop
