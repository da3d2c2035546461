#include "baseq/model/decoder_layer.h"

#include <ATen/ATen.h>

#include <cmath>

#include "../quant/product.h"
#include "baseq/transform/hadamard.h"
#include "learned_attention.h"

namespace baseq {
namespace {

/// A copy with fn applied to every tensor that is there.
template <class Fn>
DecoderLayer mapped(DecoderLayer layer, Fn&& fn) {
  const auto map = [&](Tensor& tensor) {
    if (tensor.defined()) tensor = fn(tensor);
  };
  map(layer.input_layernorm.weight);
  map(layer.post_attention_layernorm.weight);
  map(layer.self_attn.q_norm.weight);
  map(layer.self_attn.k_norm.weight);
  map(layer.mlp.down_scale);
  layer.for_each_linear([&](const std::string&, Linear& linear) {
    map(linear.weight);
    map(linear.bias);
  });
  layer.for_each_quant_point([&](const std::string&, QuantPoint& point) {
    map(point.qparams.scale);
    map(point.qparams.zero_point);
    map(point.clip);
    map(point.gain);
    map(point.shift);
  });
  return layer;
}

Tensor transformed(const Tensor& x, bool hadamard) { return hadamard ? hadamard_transform(x) : x; }

}  // namespace

Tensor Linear::forward(const Tensor& x) const {
  if (weight.scalar_type() == x.scalar_type()) return linear_product(x, weight, bias);
  const Tensor product = at::linear(x.to(weight.scalar_type()), weight).to(x.scalar_type());
  return bias.defined() ? product + bias : product;
}

Tensor Linear::dequantized() const {
  TORCH_CHECK(quantized, "Linear::dequantized: the layer has no codes");
  Tensor sum = quantized->dequantized();
  if (lora.defined()) sum += lora.product().to(sum.device());
  return sum;
}

Tensor RmsNorm::forward(const Tensor& x) const { return at::rms_norm(x, {x.size(-1)}, weight, eps); }

Tensor Attention::query(const Tensor& x) const {
  const Tensor q = q_proj.forward(x).view({x.size(0), x.size(1), num_heads, head_dim});
  return q_norm.weight.defined() ? q_norm.forward(q) : q;
}

Tensor Attention::heads(const Tensor& x, const RotaryEmbedding& rope) const {
  const auto batch = x.size(0), seq = x.size(1);
  Tensor q = query(x);
  Tensor k = k_proj.forward(x).view({batch, seq, num_kv_heads, head_dim});
  if (k_norm.weight.defined()) k = k_norm.forward(k);
  Tensor v = v_proj.forward(x);
  if (use_rope) {
    q = rope.forward(q);
    k = rope.forward(k);
  }
  q = transformed(q, query_key_hadamard);
  k = transformed(k, query_key_hadamard);
  k = k_cache.forward(k.reshape({batch, seq, num_kv_heads * head_dim})).view({batch, seq, num_kv_heads, head_dim});
  v = v_cache.forward(v).view({batch, seq, num_kv_heads, head_dim});
  // A window as long as the sequence hides nothing, and without a mask attention is faster.
  std::optional<Tensor> mask;
  if (sliding_window > 0 && sliding_window < seq) {
    mask = at::ones({seq, seq}, x.options().dtype(at::kBool)).tril_().triu_(1 - sliding_window);
  }
  q = q.transpose(1, 2);
  k = k.transpose(1, 2);
  v = v.transpose(1, 2);
  const at::ScalarType products = v_proj.weight.scalar_type();
  const bool learning = v.requires_grad() && products != x.scalar_type() && !mask;
  const Tensor attended =
      learning ? learned_attention(q, k, v, scaling.value_or(1 / std::sqrt(static_cast<double>(head_dim))), products)
               : at::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0, /*is_causal=*/!mask, scaling,
                                                  /*enable_gqa=*/num_heads != num_kv_heads);
  return transformed(attended.transpose(1, 2).reshape({batch, seq, num_heads * head_dim}), o_hadamard);
}

Tensor Mlp::gated(const Tensor& x) const {
  Tensor product = at::silu(gate_proj.forward(x)) * up_proj.forward(x);
  if (down_scale.defined()) product = product * down_scale;
  return transformed(product, down_hadamard);
}

DecoderLayer DecoderLayer::create(const ModelConfig& config, int64_t index) {
  const ModelConfig::Block& block = config.blocks.at(static_cast<size_t>(index));
  DecoderLayer layer;
  layer.residual_multiplier = config.residual_multiplier;
  layer.input_layernorm.eps = layer.post_attention_layernorm.eps = config.rms_norm_eps;
  Attention& attention = layer.self_attn;
  attention.num_heads = config.num_attention_heads;
  attention.num_kv_heads = config.num_key_value_heads;
  attention.head_dim = config.head_dim;
  attention.use_rope = block.rope;
  attention.sliding_window = block.sliding_window;
  attention.scaling = config.attention_multiplier;
  attention.q_norm.eps = attention.k_norm.eps = config.rms_norm_eps;
  return layer;
}

DecoderLayer DecoderLayer::to(const at::TensorOptions& options) const& {
  return mapped(*this, [&](const Tensor& tensor) { return tensor.to(options); });
}

DecoderLayer DecoderLayer::to(const at::TensorOptions& options) && {
  return mapped(std::move(*this), [&](const Tensor& tensor) { return tensor.to(options); });
}

DecoderLayer DecoderLayer::detach() const {
  return mapped(*this, [](const Tensor& tensor) { return tensor.detach(); });
}

Tensor DecoderLayer::add(const Tensor& residual, const Tensor& branch) const {
  return residual_multiplier == 1 ? residual + branch : residual + branch * residual_multiplier;
}

Tensor DecoderLayer::after_attention(const Tensor& x, const RotaryEmbedding& rope) const {
  return add(x, self_attn.o_proj.forward(input_of(InputPoint::kO, x, rope)));
}

Tensor DecoderLayer::mlp_input(const Tensor& middle) const {
  return mlp.input.forward(transformed(post_attention_layernorm.forward(middle), mlp.input_hadamard));
}

Tensor DecoderLayer::forward(const Tensor& x, const RotaryEmbedding& rope) const {
  const Tensor middle = after_attention(x, rope);
  return add(middle, mlp.down_proj.forward(mlp.down_input.forward(mlp.gated(mlp_input(middle)))));
}

Tensor DecoderLayer::input_of(InputPoint point, const Tensor& x, const RotaryEmbedding& rope) const {
  switch (point) {
    case InputPoint::kQkv:
      return self_attn.input.forward(transformed(input_layernorm.forward(x), self_attn.input_hadamard));
    case InputPoint::kO:
      return self_attn.o_input.forward(self_attn.heads(input_of(InputPoint::kQkv, x, rope), rope));
    case InputPoint::kGateUp:
      return mlp_input(after_attention(x, rope));
    case InputPoint::kDown:
      return mlp.down_input.forward(mlp.gated(input_of(InputPoint::kGateUp, x, rope)));
  }
  TORCH_INTERNAL_ASSERT(false, "unknown InputPoint");
}

}  // namespace baseq
