#pragma once

#include <filesystem>

#include "baseq/model/stored_model.h"

namespace baseq {

/// Whether a file begins as GGUF files do; false for one that cannot be opened.
bool is_gguf(const std::filesystem::path& path);

/// The model in a GGUF file: config.json from the metadata, rows of q and k in Hugging Face's order, linears of types
/// Q8_0 and Q4_0 as int8 codes, all others dequantized. Factors of the rotary embedding are read where they are those
/// of Llama 3's rule. Not installed.
/// Throws naming metadata that is missing or asks for something unsupported, or a tensor of an unknown type or cut off.
StoredModel read_gguf(const std::filesystem::path& path);

}  // namespace baseq
