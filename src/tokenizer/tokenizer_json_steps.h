#pragma once

#include <vector>

#include "json_component.h"
#include "tokenizer_json.h"

namespace baseq {

/// What the steps of all components of a file have asked for so far.
struct StepReading {
  Unsupported& unsupported;
  int num_steps = 0;         // Sequences included
  size_t pattern_bytes = 0;  // of regular expressions
};

/// The steps of one component of a tokenizer.json, null or an object, and of those in a Sequence. What is not supported
/// goes to `unsupported`; a malformed value, one step too many or too long regular expressions throw c10::Error.
std::vector<Normalizer> read_normalizer(const JsonComponent& root, StepReading& reading);
std::vector<PreTokenizer> read_pre_tokenizer(const JsonComponent& root, StepReading& reading);
PostProcessing read_post_processor(const JsonComponent& root, StepReading& reading);
std::vector<Decoder> read_decoder(const JsonComponent& root, StepReading& reading);

}  // namespace baseq
