#pragma once

#include <vector>

#include "json_component.h"
#include "tokenizer_json.h"

namespace baseq {

/// The steps of one component of a tokenizer.json, null or an object, and of those in a Sequence. What is not supported
/// goes to `unsupported`; a malformed value throws c10::Error.
std::vector<Normalizer> read_normalizer(const JsonComponent& root, Unsupported& unsupported);
std::vector<PreTokenizer> read_pre_tokenizer(const JsonComponent& root, Unsupported& unsupported);
PostProcessing read_post_processor(const JsonComponent& root, Unsupported& unsupported);
std::vector<Decoder> read_decoder(const JsonComponent& root, Unsupported& unsupported);

}  // namespace baseq
