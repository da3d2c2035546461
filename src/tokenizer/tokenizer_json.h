#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "added_tokens.h"
#include "bpe.h"
#include "decoder.h"
#include "normalizer.h"
#include "pre_tokenizer.h"

namespace baseq {

/// Ids that TemplateProcessing puts around those of a text.
struct PostProcessing {
  std::vector<int32_t> before, after;
};

/// What a supported tokenizer.json says. A Sequence of steps is their list.
struct TokenizerJson {
  std::vector<AddedToken> added_tokens;  // in the order of the file
  std::vector<Normalizer> normalizer;
  std::vector<PreTokenizer> pre_tokenizer;
  Vocab vocab;
  Merges merges;
  BpeOptions model;
  PostProcessing post_processor;
  std::vector<Decoder> decoder;
};

/// Throws c10::Error that names every component and option that is not supported, or the first malformed value.
TokenizerJson read_tokenizer_json(const nlohmann::json& value);

}  // namespace baseq
