#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "baseq/io/gguf_file.h"

/// Byte-level BPE tokenizers of GGUF files. Not installed.
namespace baseq {

/// llama.cpp's names of the pre-tokenizers that this program knows -> what tokenizer.json says for them.
const std::map<std::string, nlohmann::json>& gguf_pre_tokenizers();

// llama.cpp's token types.
enum class GgufTokenType : int32_t { kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5 };

/// The tokenizer.json that the metadata stand for. Throws naming what is missing or another tokenizer than byte-level
/// BPE with one of these pre-tokenizers.
nlohmann::json gguf_tokenizer_json(const GgufFile& file);

}  // namespace baseq
