#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#pragma GCC visibility push(default)
namespace baseq {

/// The rotary embedding: `rope_theta` and what `rope_scaling` of transformers 4 or `rope_parameters` of 5 says. Which
/// fields count depends on the type.
struct RopeParameters {
  enum class Type { kDefault, kLinear, kDynamic, kLlama3, kYarn, kLongrope };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double partial_rotary_factor = 1.0;  ///< share of a head's features that turn, the first ones
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;  ///< tokens; the config's max_position_embeddings where it gives none
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  ///< llama3
  std::optional<double> attention_factor{};              ///< yarn, longrope: of cos and sin; absent: from the others
  double beta_fast = 32.0, beta_slow = 1.0;              ///< yarn
  std::optional<double> mscale{}, mscale_all_dim{};      ///< yarn
  bool truncate = true;                                  ///< yarn
  std::vector<double> short_factor{}, long_factor{};     ///< longrope: a divisor a frequency
};

/// The fields of a Llama-style config.json that change what the decoder computes, those of every supported architecture
/// in one place. Hugging Face names; what an architecture does not have is at the value that changes nothing.
///
///     const ModelConfig& config = model.config();
///     const int64_t cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;  // a token
struct ModelConfig {
  /// What may differ between the blocks of a model.
  struct Block {
    bool rope = true;
    int64_t sliding_window = 0;  ///< tokens that a query sees, itself included; 0: all before it
  };

  std::string architecture{};
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  RopeParameters rope{};
  std::vector<Block> blocks{};     ///< [num_hidden_layers]
  bool attention_bias = false;     ///< q, k and v
  bool o_bias = false;             ///< o
  bool mlp_bias = false;           ///< gate, up and down
  bool qk_norm = false;            ///< an RmsNorm over every head of q and k, before RoPE
  bool fused_projections = false;  ///< an unquantized checkpoint stores qkv_proj and gate_up_proj
  bool tie_word_embeddings = false;
  // Granite's multipliers.
  double embedding_multiplier = 1.0;
  double residual_multiplier = 1.0;              ///< of what attention and MLP add
  std::optional<double> attention_multiplier{};  ///< of q k^T; absent: 1 / sqrt(head_dim)
  double logits_scaling = 1.0;                   ///< logits are divided by it

  /// Throws c10::Error that names the field when it is missing, impossible, or asks for something unsupported.
  static ModelConfig from_json(const nlohmann::json& config, const std::string& path);
};

}  // namespace baseq
#pragma GCC visibility pop
