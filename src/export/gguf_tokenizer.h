#pragma once

#include "baseq/io/checkpoint.h"
#include "gguf_file.h"

namespace baseq {

/// Adds the tokenizer.* pairs from tokenizer.json, tokenizer_config.json and the ids of config.json: byte-level BPE
/// with a pre-tokenizer that llama.cpp knows. Throws c10::Error naming what it does not know.
void add_gguf_tokenizer(GgufMetadata& metadata, const Checkpoint& checkpoint, int64_t vocab_size);

}  // namespace baseq
