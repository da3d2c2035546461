#include "baseq/model/decoder_layer.h"

#include <ATen/ATen.h>

#include "baseq/transform/hadamard.h"

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
  map(layer.mlp.down_scale);
  layer.for_each_linear([&](const std::string&, Linear& linear) {
    map(linear.weight);
    map(linear.bias);
  });
  layer.for_each_quant_point([&](const std::string&, QuantPoint& point) {
    map(point.clip);
    map(point.gain);
    map(point.shift);
  });
  return layer;
}

Tensor transformed(const Tensor& x, bool hadamard) { return hadamard ? hadamard_transform(x) : x; }

}  // namespace

Tensor Linear::forward(const Tensor& x) const {
  if (weight.scalar_type() == x.scalar_type()) return at::linear(x, weight, bias);
  const Tensor product = at::linear(x.to(weight.scalar_type()), weight).to(x.scalar_type());
  return bias.defined() ? product + bias : product;
}

Tensor RmsNorm::forward(const Tensor& x) const { return at::rms_norm(x, {x.size(-1)}, weight, eps); }

RotaryEmbedding RotaryEmbedding::create(const ModelConfig& config, int64_t seq_len, const at::TensorOptions& options) {
  const auto even = at::arange(0, config.head_dim, 2, at::kLong).to(at::kFloat) / config.head_dim;
  const Tensor inv_freq = 1.0 / at::pow(at::Scalar(config.rope_theta), even);
  const Tensor angles = at::outer(at::arange(seq_len, at::kFloat), inv_freq).repeat({1, 2});
  return {at::cos(angles).to(options), at::sin(angles).to(options)};
}

Tensor RotaryEmbedding::forward(const Tensor& x) const {
  const auto seq = x.size(1);
  const auto halves = x.chunk(2, /*dim=*/-1);
  const Tensor turned = at::cat({-halves[1], halves[0]}, /*dim=*/-1);
  const auto table = [&](const Tensor& t) { return t.narrow(0, 0, seq).unsqueeze(1); };  // [seq, 1, head_dim]
  return x * table(cos) + turned * table(sin);
}

Tensor Attention::heads(const Tensor& x, const RotaryEmbedding& rope) const {
  const auto batch = x.size(0), seq = x.size(1);
  Tensor q = rope.forward(q_proj.forward(x).view({batch, seq, num_heads, head_dim}));
  Tensor k = rope.forward(k_proj.forward(x).view({batch, seq, num_kv_heads, head_dim}));
  Tensor v = v_proj.forward(x);
  q = transformed(q, query_key_hadamard);
  k = transformed(k, query_key_hadamard);
  k = k_cache.forward(k.reshape({batch, seq, num_kv_heads * head_dim})).view({batch, seq, num_kv_heads, head_dim});
  v = v_cache.forward(v).view({batch, seq, num_kv_heads, head_dim});
  const Tensor attended =
      at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), /*attn_mask=*/{},
                                       /*dropout_p=*/0.0, /*is_causal=*/true, /*scale=*/std::nullopt,
                                       /*enable_gqa=*/num_heads != num_kv_heads);
  return transformed(attended.transpose(1, 2).reshape({batch, seq, num_heads * head_dim}), o_hadamard);
}

Tensor Mlp::gated(const Tensor& x) const {
  Tensor product = at::silu(gate_proj.forward(x)) * up_proj.forward(x);
  if (down_scale.defined()) product = product * down_scale;
  return transformed(product, down_hadamard);
}

DecoderLayer DecoderLayer::to(const at::TensorOptions& options) const {
  return mapped(*this, [&](const Tensor& tensor) { return tensor.to(options); });
}

DecoderLayer DecoderLayer::detach() const {
  return mapped(*this, [](const Tensor& tensor) { return tensor.detach(); });
}

Tensor DecoderLayer::after_attention(const Tensor& x, const RotaryEmbedding& rope) const {
  return x + self_attn.o_proj.forward(input_of(InputPoint::kO, x, rope));
}

Tensor DecoderLayer::mlp_input(const Tensor& middle) const {
  return mlp.input.forward(transformed(post_attention_layernorm.forward(middle), mlp.input_hadamard));
}

Tensor DecoderLayer::forward(const Tensor& x, const RotaryEmbedding& rope) const {
  const Tensor middle = after_attention(x, rope);
  return middle + mlp.down_proj.forward(mlp.down_input.forward(mlp.gated(mlp_input(middle))));
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
