#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "baseq/io/gguf_file.h"
#include "baseq/model/stored_model.h"

/// GGUF files as checkpoints. Not installed.
namespace baseq {

/// An architecture that Hugging Face and llama.cpp know under different names.
struct GgufArchitecture {
  const char* architecture;  ///< in config.json's "architectures"
  const char* model_type;
  const char* name;  ///< llama.cpp's, in front of its metadata
  /// llama.cpp rotates neighbouring features where Hugging Face rotates those half a head apart: rows of q and k change
  /// places.
  bool permuted;
};
/// Where several have one name in llama.cpp, the first is what a file of that name is read as.
constexpr GgufArchitecture kGgufArchitectures[] = {{"LlamaForCausalLM", "llama", "llama", true},
                                                   {"MistralForCausalLM", "mistral", "llama", true},
                                                   {"Qwen2ForCausalLM", "qwen2", "qwen2", false},
                                                   {"Qwen3ForCausalLM", "qwen3", "qwen3", false}};

/// The linears of a block, Hugging Face's name -> llama.cpp's.
const std::map<std::string, std::string>& gguf_linear_names();

/// What a tensor of a file stands for, see gguf_values.
Tensor gguf_values(const GgufFile& file, const std::string& name);

/// A model of one of kGgufArchitectures under Hugging Face's names: config.json from the metadata, rows of q and k in
/// their order, linears of types Q8_0 and Q4_0 as int8 codes, all others dequantized. Factors of the rotary embedding
/// are read where they are those of Llama 3's rule.
/// Throws naming metadata that is missing or asks for something unsupported, or a tensor of an unknown type or cut off.
StoredModel read_gguf(const std::filesystem::path& path);

}  // namespace baseq
