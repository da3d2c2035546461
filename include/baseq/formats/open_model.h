#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "baseq/model/decoder_layer.h"
#include "baseq/model/stored_model.h"
#include "baseq/tokenizer/tokenizer.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The tensors of a block as a native checkpoint stores them, by full name: packed codes with compressed-tensors' names
/// for quantized linears, `dtype` for other matrices, float32 for vectors (norms, biases, quant points) and for online
/// transforms, whose inverses are left out where Model::online_transform gives none.
///
///     const auto tensors = layer_tensors(model.layer(0), layer_prefix(0), at::kBFloat16);
///     for (const auto& [name, tensor] : tensors) writer.add(name, tensor);  // a CheckpointWriter
///
/// @param prefix such as "model.layers.0."
std::map<std::string, Tensor> layer_tensors(const DecoderLayer& layer, const std::string& prefix, at::ScalarType dtype);

/// Opens a checkpoint directory or a GGUF file of any tool that baseq reads:
///   const Model model(open_model("Qwen3-0.6B-Q8_0.gguf"));
/// Original, native, compressed-tensors, GPTQ, AWQ; GPTQ, AWQ and GGUF tensors are converted as they are asked for.
/// Throws c10::Error naming what is missing or not supported.
StoredModel open_model(const std::filesystem::path& path);

/// The tokenizer of such a checkpoint: tokenizer.json of a directory, that file itself, or the one in a GGUF file's
/// metadata, which must be byte-level BPE with a pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2.
///   const Tensor ids = token_ids(open_tokenizer("SmolLM2-135M-Instruct"), "The quick brown fox");
/// Throws c10::Error naming what is missing or not supported.
Tokenizer open_tokenizer(const std::filesystem::path& path);

/// How a checkpoint wants conversations written, see ChatTemplate.
struct StoredChat {
  std::string path{};   ///< of the checkpoint, for messages
  std::string jinja{};  ///< empty: it has no chat template
  std::string bos_token{}, eos_token{};
};
/// From chat_template.jinja, tokenizer_config.json and special_tokens_map.json, or a GGUF file's metadata. Throws
/// c10::Error naming a value that is malformed.
StoredChat open_chat(const std::filesystem::path& path);

}  // namespace baseq
#pragma GCC visibility pop
