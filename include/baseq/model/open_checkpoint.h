#pragma once

#include <filesystem>

#include "baseq/io/checkpoint.h"
#include "baseq/tokenizer/tokenizer.h"

namespace baseq {

/// A checkpoint directory or a GGUF file, by whichever tool, as Model reads it: original, native and compressed-tensors
/// directories as they are; GPTQ, AWQ and GGUF under the names and in the layout of compressed-tensors, converted as
/// tensors are asked for. `quantization_config.read_from` in config() then names the format.
/// Throws c10::Error naming what is missing or not supported.
Checkpoint open_checkpoint(const std::filesystem::path& path);

/// The tokenizer of such a checkpoint: tokenizer.json of a directory, or what the metadata of a GGUF file say where
/// they hold byte-level BPE with a pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2. Throws c10::Error naming what is
/// missing or not supported.
Tokenizer open_tokenizer(const std::filesystem::path& path);

}  // namespace baseq
