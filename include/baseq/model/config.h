#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace baseq {

/// The fields of a Llama-style config.json that change what the decoder computes. Hugging Face names.
struct ModelConfig {
  std::string architecture;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  bool attention_bias = false;  ///< q, k, v and o
  bool mlp_bias = false;        ///< gate, up and down
  bool tie_word_embeddings = false;

  /// Throws c10::Error that names the field when it is missing, impossible, or asks for something unsupported.
  static ModelConfig from_json(const nlohmann::json& config, const std::string& path);
};

}  // namespace baseq
