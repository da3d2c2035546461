#pragma once

#include <nlohmann/json.hpp>

#include "baseq/io/checkpoint.h"
#include "formats/gguf/file.h"

/// Byte-level BPE tokenizers of GGUF files. Not installed.
namespace baseq {

/// The tokenizer.json that the metadata stand for. Throws naming what is missing or another tokenizer than byte-level
/// BPE with a known pre-tokenizer.
nlohmann::json gguf_tokenizer_json(const GgufFile& file);

/// The other way: adds the tokenizer.* pairs from tokenizer.json, tokenizer_config.json and the ids of config.json.
/// Throws c10::Error naming what llama.cpp has no name for.
void add_gguf_tokenizer(GgufMetadata& metadata, const Checkpoint& checkpoint, int64_t vocab_size);

}  // namespace baseq
