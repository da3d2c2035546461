#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include "baseq/model/decoder_layer.h"

namespace baseq {

/// The sizes of a Llama block.
struct BlockShape {
  int64_t hidden, ffn, heads, kv_heads, head_dim;
};

/// A block of random weights, norms with gain 1.
inline DecoderLayer random_block(const BlockShape& shape) {
  const auto weight = [](int64_t out, int64_t in) {
    return at::randn({out, in}).div_(std::sqrt(static_cast<double>(in)));
  };
  DecoderLayer layer;
  layer.input_layernorm.weight = layer.post_attention_layernorm.weight = at::ones({shape.hidden});
  Attention& attention = layer.self_attn;
  attention.num_heads = shape.heads;
  attention.num_kv_heads = shape.kv_heads;
  attention.head_dim = shape.head_dim;
  attention.q_proj.weight = weight(shape.heads * shape.head_dim, shape.hidden);
  attention.k_proj.weight = weight(shape.kv_heads * shape.head_dim, shape.hidden);
  attention.v_proj.weight = weight(shape.kv_heads * shape.head_dim, shape.hidden);
  attention.o_proj.weight = weight(shape.hidden, shape.heads * shape.head_dim);
  layer.mlp.gate_proj.weight = weight(shape.ffn, shape.hidden);
  layer.mlp.up_proj.weight = weight(shape.ffn, shape.hidden);
  layer.mlp.down_proj.weight = weight(shape.hidden, shape.ffn);
  return layer;
}

}  // namespace baseq
