#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "baseq/io/safetensors.h"
#include "baseq/model/model.h"
#include "io/temp_directory.h"

namespace baseq::test {

/// The sizes of a tiny Llama; what differs between variants is what has broken code before.
struct TinyShape {
  std::string name = "gqa";
  int64_t hidden_size = 32, intermediate_size = 48;
  int64_t num_heads = 4, num_kv_heads = 2, head_dim = 8;
  int64_t num_layers = 2, vocab_size = 40;
  bool bias = false, tied = true;
};

/// How GoogleTest names it in messages.
inline void PrintTo(const TinyShape& shape, std::ostream* stream) { *stream << shape.name; }

inline std::vector<TinyShape> tiny_shapes() {
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

inline Tensor random_normal(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::kDouble).to(dtype);
}

inline Tensor random_ids(at::IntArrayRef sizes, int64_t vocab_size, uint64_t seed) {
  return at::randint(vocab_size, sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::kLong);
}

/// |got - expected| / |expected| in float64.
inline double relative_error(const Tensor& got, const Tensor& expected) {
  const Tensor wanted = expected.to(at::kDouble);
  return ((got.to(at::kDouble) - wanted).norm() / wanted.norm()).item<double>();
}

inline nlohmann::json tiny_config(const TinyShape& shape) {
  return {{"architectures", {"LlamaForCausalLM"}},
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
}

/// A block in which no norm gain and no bias is at its default.
inline DecoderLayer tiny_layer(const TinyShape& shape, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  seed *= 100;
  const int64_t hidden = shape.hidden_size, ffn = shape.intermediate_size;
  const int64_t q = shape.num_heads * shape.head_dim, kv = shape.num_kv_heads * shape.head_dim;
  DecoderLayer layer;
  const auto norm = [&] { return RmsNorm{(1 + 0.2 * random_normal({hidden}, seed++)).to(dtype), 1e-5}; };
  layer.input_layernorm = norm();
  layer.post_attention_layernorm = norm();
  layer.self_attn.num_heads = shape.num_heads;
  layer.self_attn.num_kv_heads = shape.num_kv_heads;
  layer.self_attn.head_dim = shape.head_dim;
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{q, hidden},   {kv, hidden},  {kv, hidden}, {hidden, q},
                                                          {ffn, hidden}, {ffn, hidden}, {hidden, ffn}};
  size_t next = 0;
  layer.for_each_linear([&](const std::string&, Linear& linear) {
    const auto [out, in] = sizes[next++];
    linear.weight = (random_normal({out, in}, seed++) / std::sqrt(double(in))).to(dtype);
    if (shape.bias) linear.bias = (0.3 * random_normal({out}, seed++)).to(dtype);
  });
  return layer;
}

inline RotaryEmbedding tiny_rope(const TinyShape& shape, int64_t seq_len, at::ScalarType dtype = at::kDouble) {
  return RotaryEmbedding::create(ModelConfig::from_json(tiny_config(shape), "config.json"), seq_len,
                                 at::TensorOptions().dtype(dtype));
}

/// Every tensor of a tiny checkpoint by its Hugging Face name.
inline std::map<std::string, Tensor> tiny_tensors(const TinyShape& shape, uint64_t seed) {
  std::map<std::string, Tensor> tensors;
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    tensors.merge(layer_tensors(tiny_layer(shape, seed + 1 + uint64_t(i), at::kFloat), layer_prefix(i), at::kFloat));
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

inline void write_checkpoint(const std::filesystem::path& directory, const TinyShape& shape, uint64_t seed = 1) {
  write_checkpoint(directory, tiny_config(shape), tiny_tensors(shape, seed));
}

}  // namespace baseq::test
