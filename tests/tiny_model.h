#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "baseq/formats/open_model.h"
#include "baseq/io/checkpoint.h"
#include "baseq/model/model.h"
#include "io/temp_directory.h"
#include "random_tensors.h"

namespace baseq::test {

/// The sizes of a tiny model; what differs between variants is what has broken code before.
struct TinyShape {
  std::string name = "gqa";
  int64_t hidden_size = 32, intermediate_size = 48;
  int64_t num_heads = 4, num_kv_heads = 2, head_dim = 8;
  int64_t num_layers = 2, vocab_size = 40;
  bool bias = false, tied = true;
  std::string architecture = "LlamaForCausalLM";
  nlohmann::json fields = nlohmann::json::object();  ///< of config.json, over what the sizes say
};

/// How GoogleTest names it in messages, and a test of it.
inline void PrintTo(const TinyShape& shape, std::ostream* stream) { *stream << shape.name; }
inline constexpr auto shape_name = [](const auto& shape) { return shape.param.name; };

/// Llamas of different sizes.
inline std::vector<TinyShape> llama_shapes() {
  return {{},
          {.name = "one_kv_head_bias",
           .hidden_size = 24,
           .intermediate_size = 40,
           .num_heads = 3,
           .num_kv_heads = 1,
           .bias = true,
           .tied = false},
          {.name = "nine_heads", .hidden_size = 36, .intermediate_size = 56, .num_heads = 9, .num_kv_heads = 3},
          {.name = "wide_mha_bias", .hidden_size = 20, .intermediate_size = 24, .num_kv_heads = 4, .bias = true}};
}

/// The fields of the other architectures, all on in the first block.
inline std::vector<TinyShape> family_shapes() {
  return {{.name = "qwen3",
           .hidden_size = 24,
           .intermediate_size = 40,
           .architecture = "Qwen3ForCausalLM",
           .fields = {{"use_sliding_window", true},
                      {"sliding_window", 5},
                      {"layer_types", {"sliding_attention", "full_attention"}}}},
          {.name = "phi3",
           .intermediate_size = 40,
           .tied = false,
           .architecture = "Phi3ForCausalLM",
           .fields = {{"partial_rotary_factor", 0.5}, {"sliding_window", 6}}},
          {.name = "smollm3",
           .intermediate_size = 40,
           .architecture = "SmolLM3ForCausalLM",
           .fields = {{"no_rope_layers", {0, 1}}}},
          {.name = "granite",
           .intermediate_size = 40,
           .bias = true,
           .architecture = "GraniteForCausalLM",
           .fields = {{"embedding_multiplier", 3.0},
                      {"residual_multiplier", 0.4},
                      {"attention_multiplier", 0.5},
                      {"logits_scaling", 1.7}}}};
}

inline std::vector<TinyShape> tiny_shapes() {
  std::vector<TinyShape> shapes = llama_shapes();
  for (TinyShape& shape : family_shapes()) shapes.push_back(std::move(shape));
  return shapes;
}

inline Tensor random_ids(at::IntArrayRef sizes, int64_t vocab_size, uint64_t seed) {
  return at::randint(vocab_size, sizes, generator(seed), at::kLong);
}

inline nlohmann::json tiny_config(const TinyShape& shape) {
  nlohmann::json config{{"architectures", {shape.architecture}},
                        {"hidden_act", "silu"},
                        {"hidden_size", shape.hidden_size},
                        {"intermediate_size", shape.intermediate_size},
                        {"num_attention_heads", shape.num_heads},
                        {"num_key_value_heads", shape.num_kv_heads},
                        {"head_dim", shape.head_dim},
                        {"num_hidden_layers", shape.num_layers},
                        {"vocab_size", shape.vocab_size},
                        {"rms_norm_eps", 1e-5},
                        {"rope_theta", 10000.0},
                        {"attention_bias", shape.bias},
                        {"mlp_bias", shape.bias},
                        {"tie_word_embeddings", shape.tied}};
  config.update(shape.fields);
  return config;
}

inline ModelConfig tiny_model_config(const TinyShape& shape) {
  return ModelConfig::from_json(tiny_config(shape), "config.json");
}

/// The first block, in which no norm gain and no bias is at its default.
inline DecoderLayer tiny_layer(const TinyShape& shape, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  seed *= 100;
  const ModelConfig config = tiny_model_config(shape);
  const int64_t hidden = shape.hidden_size, ffn = shape.intermediate_size;
  const int64_t q = shape.num_heads * shape.head_dim, kv = shape.num_kv_heads * shape.head_dim;
  DecoderLayer layer = DecoderLayer::create(config, 0);
  const auto gain = [&](int64_t features) { return (1 + 0.2 * random_normal({features}, seed++)).to(dtype); };
  layer.input_layernorm.weight = gain(hidden);
  layer.post_attention_layernorm.weight = gain(hidden);
  const bool attention = config.attention_bias, o = config.o_bias, mlp = config.mlp_bias;
  const std::vector<std::tuple<int64_t, int64_t, bool>> sizes = {
      {q, hidden, attention}, {kv, hidden, attention}, {kv, hidden, attention}, {hidden, q, o},
      {ffn, hidden, mlp},     {ffn, hidden, mlp},      {hidden, ffn, mlp}};
  size_t next = 0;
  layer.for_each_linear([&](const std::string&, Linear& linear) {
    const auto [out, in, bias] = sizes[next++];
    linear.weight = (random_normal({out, in}, seed++) / std::sqrt(double(in))).to(dtype);
    if (bias) linear.bias = (0.3 * random_normal({out}, seed++)).to(dtype);
  });
  if (config.qk_norm) {
    layer.self_attn.q_norm.weight = gain(shape.head_dim);
    layer.self_attn.k_norm.weight = gain(shape.head_dim);
  }
  return layer;
}

inline RotaryEmbedding tiny_rope(const TinyShape& shape, int64_t seq_len, at::ScalarType dtype = at::kDouble) {
  return RotaryEmbedding::create(tiny_model_config(shape), seq_len, at::TensorOptions().dtype(dtype));
}

/// Every tensor of a tiny checkpoint by its Hugging Face name.
inline std::map<std::string, Tensor> tiny_tensors(const TinyShape& shape, uint64_t seed) {
  std::map<std::string, Tensor> tensors;
  const bool fused = tiny_model_config(shape).fused_projections;
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    const std::string prefix = layer_prefix(i);
    auto block = layer_tensors(tiny_layer(shape, seed + 1 + uint64_t(i), at::kFloat), prefix, at::kFloat);
    const auto fuse = [&](const std::string& name, std::initializer_list<const char*> parts) {
      std::vector<Tensor> rows;
      for (const char* part : parts) rows.push_back(block.extract(prefix + part + ".weight").mapped());
      block[prefix + name + ".weight"] = at::cat(rows);
    };
    if (fused) {
      fuse("self_attn.qkv_proj", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"});
      fuse("mlp.gate_up_proj", {"mlp.gate_proj", "mlp.up_proj"});
    }
    tensors.merge(block);
  }
  const int64_t vocab = shape.vocab_size, hidden = shape.hidden_size;
  tensors["model.embed_tokens.weight"] = random_normal({vocab, hidden}, seed, at::kFloat);
  tensors["model.norm.weight"] = (1 + 0.2 * random_normal({hidden}, seed + 90)).to(at::kFloat);
  if (!shape.tied) {
    tensors["lm_head.weight"] = (random_normal({vocab, hidden}, seed + 91) / std::sqrt(double(hidden))).to(at::kFloat);
  }
  return tensors;
}

inline void write_checkpoint(const std::filesystem::path& directory, const nlohmann::json& config,
                             const std::map<std::string, Tensor>& tensors) {
  std::filesystem::create_directories(directory);
  write_bytes(directory / "config.json", config.dump());
  save_safetensors(directory / "model.safetensors", tensors);
}

/// The checkpoints of scripts/make_goldens.py besides tiny_llama_*'s first four.
inline std::vector<std::string> golden_variants() {
  return {"llama_linear", "llama_dynamic", "llama_llama3",  "llama_yarn", "llama_yarn_options", "mistral", "qwen2",
          "qwen2_window", "qwen3",         "qwen3_options", "phi3",       "phi3_longrope",      "smollm3", "granite"};
}

inline std::filesystem::path golden_directory(const std::string& variant) {
  return std::filesystem::path(BASEQ_TEST_DATA) / ("tiny_" + variant);
}

inline void write_checkpoint(const std::filesystem::path& directory, const TinyShape& shape, uint64_t seed = 1) {
  write_checkpoint(directory, tiny_config(shape), tiny_tensors(shape, seed));
}

}  // namespace baseq::test
