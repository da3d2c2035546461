#include "baseq/model/config.h"

#include <c10/util/Exception.h>

#include "baseq/io/json_object.h"

namespace baseq {
namespace {

/// Sizes beyond this are a broken file, not a model: products of two of them still fit in 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 30;

int64_t size_field(JsonObject& config, const char* key, int64_t fallback = -1) {
  const int64_t size = config.integer(key, fallback, 1, kMaxSize);
  TORCH_CHECK(size > 0, config.path(), ": ", key, ": missing; a positive integer is required");
  return size;
}

/// `rope_scaling`, or `rope_parameters` as transformers 5 spells it; only the plain rotary embedding is known.
void read_rope(JsonObject& config, const nlohmann::json& json, ModelConfig& model) {
  model.rope_theta = config.number("rope_theta", model.rope_theta, 1.0, 1e12);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!config.contains(key)) continue;
    JsonObject rope(json.at(key), config.path() + ": " + key);
    const std::string type = rope.text("rope_type", rope.text("type", "default"));
    TORCH_CHECK(type == "default", config.path(), ": ", key, ": rope_type \"", type,
                "\" is not supported; supported is \"default\"");
    model.rope_theta = rope.number("rope_theta", model.rope_theta, 1.0, 1e12);
  }
}

}  // namespace

ModelConfig ModelConfig::from_json(const nlohmann::json& json, const std::string& path) {
  JsonObject config(json, path);
  ModelConfig model;
  const auto architectures = config.texts("architectures");
  TORCH_CHECK(architectures.size() == 1, path, ": architectures: expected one name, got ", architectures.size());
  model.architecture = architectures[0];
  TORCH_CHECK(model.architecture == "LlamaForCausalLM", path, ": architecture \"", model.architecture,
              "\" is not supported; supported is \"LlamaForCausalLM\"");
  const std::string activation = config.text("hidden_act", "silu");
  TORCH_CHECK(activation == "silu", path, ": hidden_act \"", activation, "\" is not supported; supported is \"silu\"");

  model.hidden_size = size_field(config, "hidden_size");
  model.intermediate_size = size_field(config, "intermediate_size");
  model.num_hidden_layers = size_field(config, "num_hidden_layers");
  model.num_attention_heads = size_field(config, "num_attention_heads");
  model.num_key_value_heads = size_field(config, "num_key_value_heads", model.num_attention_heads);
  TORCH_CHECK(model.num_attention_heads % model.num_key_value_heads == 0, path, ": num_attention_heads ",
              model.num_attention_heads, " is not a multiple of num_key_value_heads ", model.num_key_value_heads);
  if (!config.contains("head_dim")) {
    TORCH_CHECK(model.hidden_size % model.num_attention_heads == 0, path, ": hidden_size ", model.hidden_size,
                " is not a multiple of num_attention_heads ", model.num_attention_heads);
  }
  model.head_dim = size_field(config, "head_dim", model.hidden_size / model.num_attention_heads);
  TORCH_CHECK(model.head_dim % 2 == 0, path, ": head_dim ", model.head_dim, " is odd; rotary embeddings need pairs");
  model.vocab_size = size_field(config, "vocab_size");
  model.rms_norm_eps = config.number("rms_norm_eps", model.rms_norm_eps, 0.0, 1.0);
  read_rope(config, json, model);
  model.attention_bias = config.boolean("attention_bias", false);
  model.mlp_bias = config.boolean("mlp_bias", false);
  model.tie_word_embeddings = config.boolean("tie_word_embeddings", false);
  return model;
}

}  // namespace baseq
