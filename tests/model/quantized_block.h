#pragma once

#include <algorithm>

#include "../tiny_model.h"
#include "formats/native/config.h"

namespace baseq::test {

/// A block as a native checkpoint has it, with everything that one can have: codes, corrections of low rank, online
/// transforms, and points with clips, gains and shifts where the quantization asks for points.
inline DecoderLayer quantized_block(const TinyShape& shape, const QuantizationConfig& quantization,
                                    at::ScalarType lora_dtype = at::kBFloat16, uint64_t seed = 5) {
  DecoderLayer layer = tiny_layer(shape, seed, at::kFloat);
  layer.for_each_linear([&](const std::string&, Linear& linear) {
    linear.quantized = round_to_nearest(linear.weight, *quantization.weights);
    if (quantization.lora_rank > 0) {
      const int64_t out = linear.weight.size(0), in = linear.weight.size(1);
      const int64_t rank = std::min({quantization.lora_rank, out, in});
      linear.lora = store_factors(random_normal({rank, in}, 60, at::kFloat) * 0.1,
                                  random_normal({out, rank}, 61, at::kFloat) * 0.1, lora_dtype);
    }
    linear.weight = linear.dequantized();
  });
  layer.transform(Site::kQueryKey) = {hadamard_factor(shape.head_dim)};
  layer.transform(Site::kDown) = {hadamard_factor(shape.intermediate_size)};
  uint64_t next = 70;
  const auto vector = [&](int64_t n) { return random_normal({n}, next++, at::kFloat); };
  layer.for_each_quant_point([&](const std::string&, QuantPoint& point) {
    const bool cache = &point == &layer.self_attn.k_cache || &point == &layer.self_attn.v_cache;
    const auto& spec = cache ? quantization.kv_cache : quantization.input_activations;
    point.enabled = spec.has_value();
    point.add_shift_back = false;
    if (!spec) return;
    point.spec = *spec;
    point.clip = at::full({cache ? shape.num_kv_heads : 1, 1}, 0.9);
  });
  layer.mlp.down_input.gain = 1 + 0.1 * vector(shape.intermediate_size).abs();
  layer.mlp.down_input.shift = 0.1 * vector(shape.intermediate_size);
  layer.self_attn.k_cache.shift = 0.1 * vector(shape.num_kv_heads * shape.head_dim);
  layer.self_attn.v_cache.shift = 0.1 * vector(shape.num_kv_heads * shape.head_dim);
  return layer;
}

/// A native checkpoint all of whose blocks are `layer`.
inline void write_quantized(const std::filesystem::path& directory, const TinyShape& shape,
                            const QuantizationConfig& quantization, const DecoderLayer& layer) {
  nlohmann::json config = tiny_config(shape);
  config["quantization_config"] = to_json(quantization);
  auto tensors = tiny_tensors(shape, 1);
  std::erase_if(tensors, [](const auto& item) { return item.first.starts_with("model.layers."); });
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    tensors.merge(layer_tensors(layer, layer_prefix(i), at::kFloat));
  }
  write_checkpoint(directory, config, tensors);
}

inline QuantSpec token_grid(int64_t num_bits, bool symmetric = false) {
  return {.num_bits = num_bits, .symmetric = symmetric, .strategy = Strategy::kToken, .dynamic = true};
}
inline QuantSpec cache_grid(const TinyShape& shape, int64_t num_bits, bool symmetric = false) {
  return {.num_bits = num_bits,
          .symmetric = symmetric,
          .strategy = Strategy::kGroup,
          .group_size = shape.head_dim,
          .dynamic = true};
}

}  // namespace baseq::test
