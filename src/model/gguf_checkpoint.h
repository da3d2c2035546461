#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "baseq/io/checkpoint.h"
#include "baseq/io/gguf_file.h"

/// GGUF files as checkpoints. Not installed.
namespace baseq {

/// The linears of a block, Hugging Face's name -> llama.cpp's.
const std::map<std::string, std::string>& gguf_linear_names();

/// A model of llama.cpp's architecture "llama" under Hugging Face's names: config.json from the metadata, rows of q and
/// k in their order, linears of types Q8_0 and Q4_0 as int8 codes, all others dequantized.
/// Throws naming metadata that is missing or asks for something unsupported, or a tensor of an unknown type or cut off.
Checkpoint gguf_checkpoint(const std::filesystem::path& path);
Checkpoint gguf_checkpoint(std::shared_ptr<const GgufFile> file);

}  // namespace baseq
