#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "baseq/model/config.h"
#include "baseq/tensor.h"

/// The names of Hugging Face and of llama.cpp for the same things, for reading and writing. Not installed.
namespace baseq {

struct GgufArchitecture {
  std::string_view architecture;  ///< in config.json's "architectures"
  const char* model_type;
  std::string_view name;  ///< llama.cpp's, the start of its metadata keys
  /// llama.cpp rotates neighbouring features where Hugging Face rotates those half a head apart: rows of q and k change
  /// places.
  bool permuted;
};
/// Null for one that is not known.
const GgufArchitecture* gguf_architecture(const ModelConfig& config);
/// By llama.cpp's name; where several have it, the one that a file is read as.
const GgufArchitecture* gguf_architecture_named(std::string_view name);

/// The name of a tensor in the other program: "model.layers.2.mlp.up_proj.weight" and "blk.2.ffn_up.weight"; "" for one
/// without.
std::string gguf_name(std::string_view hugging_face);
std::string hugging_face_name(std::string_view gguf);

/// llama.cpp's factors of the rotary embedding; Hugging Face has parameters for them.
inline constexpr const char* kRopeFactors = "rope_freqs.weight";

/// A size: the key after the architecture's name and a dot, and the field of config.json.
struct GgufSize {
  const char* key;
  const char* field;
  int64_t ModelConfig::*member;
};
inline constexpr GgufSize kGgufSizes[] = {
    {"context_length", "max_position_embeddings", &ModelConfig::max_position_embeddings},
    {"embedding_length", "hidden_size", &ModelConfig::hidden_size},
    {"block_count", "num_hidden_layers", &ModelConfig::num_hidden_layers},
    {"feed_forward_length", "intermediate_size", &ModelConfig::intermediate_size},
    {"attention.head_count", "num_attention_heads", &ModelConfig::num_attention_heads},
    {"attention.head_count_kv", "num_key_value_heads", &ModelConfig::num_key_value_heads},
    {"attention.key_length", "head_dim", &ModelConfig::head_dim}};

/// The ids of special tokens: metadata and config.json.
struct GgufTokenId {
  const char* key;
  const char* field;
};
inline constexpr GgufTokenId kGgufTokenIds[] = {{"tokenizer.ggml.bos_token_id", "bos_token_id"},
                                                {"tokenizer.ggml.eos_token_id", "eos_token_id"},
                                                {"tokenizer.ggml.padding_token_id", "pad_token_id"}};

/// The heads of a linear whose rows llama.cpp stores in another order; 0 for other linears.
/// @param linear  within a block, such as "self_attn.q_proj"
int64_t permuted_heads(const GgufArchitecture& architecture, std::string_view linear, int64_t query_heads,
                       int64_t key_heads);
/// Rows in llama.cpp's order, and back; with 0 heads as they are.
Tensor permute_rows(const Tensor& rows, int64_t heads);
Tensor unpermute_rows(const Tensor& rows, int64_t heads);

}  // namespace baseq
