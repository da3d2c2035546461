#pragma once

#include <filesystem>
#include <vector>

#include "added_tokens.h"
#include "bpe.h"

namespace baseq {

/// What a supported tokenizer.json says.
struct TokenizerJson {
  Vocab vocab;
  Merges merges;
  std::vector<AddedToken> added_tokens;  // in the order of the file
  bool split_digits = false;
};

/// Throws c10::Error that names every component and option that is not supported, or the first malformed value.
TokenizerJson read_tokenizer_json(const std::filesystem::path& path);

}  // namespace baseq
