#include "baseq/model/decoder_layer.h"

#include <ATen/ATen.h>

#include "../integer/prepared_linear.h"
#include "../integer/rows.h"
#include "exact_transform.h"
#include "prepared_block.h"

namespace baseq {
namespace {

/// A copy with fn applied to every tensor and factor that is there.
template <class Fn>
DecoderLayer mapped(DecoderLayer layer, Fn&& fn) {
  const auto map = [&](Tensor& tensor) {
    if (tensor.defined()) tensor = fn(tensor);
  };
  map(layer.mlp.down_scale);
  layer.for_each_norm([&](const std::string&, RmsNorm& norm) { map(norm.weight); });
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
  for (const SiteInfo& info : sites()) {
    if (!info.online) continue;
    for (Factor& factor : layer.transform(info.site)) factor = fn(factor);
  }
  return layer;
}

[[noreturn]] void throw_missing(Site site, const char* what) {
  C10_THROW_ERROR(Error, c10::str("the site ", site_info(site).name, " of a block has no ", what));
}

}  // namespace

Tensor RmsNorm::forward(const Tensor& x) const {
  return exact ? rms_norm_rows(x, weight, eps, integer_kernels()) : at::rms_norm(x, {x.size(-1)}, weight, eps);
}

Tensor Mlp::gated(const LinearInput& x) const {
  if (exact) {
    const std::vector<Tensor> y = forward_together({&gate_proj, &up_proj}, x);
    return exact_transform(down_transform, silu_product_rows(y[0], y[1], down_scale, integer_kernels()));
  }
  Tensor product = at::silu(gate_proj.forward(x)) * up_proj.forward(x);
  if (down_scale.defined()) product = product * down_scale;
  return apply_transform(down_transform, product);
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
  return mapped(*this, [&](const auto& part) { return part.to(options); });
}

DecoderLayer DecoderLayer::to(const at::TensorOptions& options) && {
  return mapped(std::move(*this), [&](const auto& part) { return part.to(options); });
}

DecoderLayer DecoderLayer::detach() const {
  return mapped(*this, [](const auto& part) { return part.detach(); });
}

Tensor DecoderLayer::add(const Tensor& residual, const Tensor& branch) const {
  if (self_attn.exact && residual_multiplier == 1) return sum_of_rows(residual, branch);
  return residual_multiplier == 1 ? residual + branch : residual + branch * residual_multiplier;
}

namespace {

/// What the readers of a site get: prepared ones round to codes.
LinearInput quantized_by(const QuantPoint& point, bool exact, Tensor x) {
  return exact ? LinearInput(std::move(x), point) : LinearInput(point.forward(x));
}

Tensor transformed(const Transform& transform, bool exact, const Tensor& x) {
  return exact ? exact_transform(transform, x) : apply_transform(transform, x);
}

}  // namespace

LinearInput DecoderLayer::attention_input(const Tensor& x) const {
  return quantized_by(self_attn.input, self_attn.exact,
                      transformed(self_attn.input_transform, self_attn.exact, input_layernorm.forward(x)));
}

Tensor DecoderLayer::after_attention(const Tensor& x, const RotaryEmbedding& rope, const CachedRows* cached) const {
  return add(x, self_attn.o_proj.forward(quantized_by(self_attn.o_input, self_attn.exact,
                                                      self_attn.heads(attention_input(x), rope, cached))));
}

LinearInput DecoderLayer::mlp_input(const Tensor& middle) const {
  return quantized_by(mlp.input, mlp.exact,
                      transformed(mlp.input_transform, mlp.exact, post_attention_layernorm.forward(middle)));
}

Tensor DecoderLayer::forward(const Tensor& x, const RotaryEmbedding& rope, const CachedRows* cached) const {
  for_each_quant_point([&](const std::string& name, const QuantPoint& point) {
    TORCH_CHECK(cached == nullptr || !point.runtime, name,
                ": Runtime Smooth sees whole sequences and keeps nothing from token to token; use no cache");
  });
  const Tensor middle = after_attention(x, rope, cached);
  return add(middle, mlp.down_proj.forward(quantized_by(mlp.down_input, mlp.exact, mlp.gated(mlp_input(middle)))));
}

Tensor DecoderLayer::input_of(Site site, const Tensor& x, const RotaryEmbedding& rope) const {
  switch (site) {
    case Site::kQkv:
      return attention_input(x).values();
    case Site::kO:
      return self_attn.o_input.forward(self_attn.heads(attention_input(x), rope));
    case Site::kGateUp:
      return mlp_input(after_attention(x, rope, nullptr)).values();
    case Site::kDown:
      return mlp.down_input.forward(mlp.gated(mlp_input(after_attention(x, rope, nullptr))));
    default:
      throw_missing(site, "readers of one input");
  }
}

Linear& DecoderLayer::linear(std::string_view name) {
  Linear* found = nullptr;
  for_each_linear([&](const std::string& other, Linear& linear) {
    if (other == name) found = &linear;
  });
  TORCH_CHECK(found, "linear: ", std::string(name), " is no linear of a block");
  return *found;
}
const Linear& DecoderLayer::linear(std::string_view name) const {
  return const_cast<DecoderLayer&>(*this).linear(name);
}

RmsNorm& DecoderLayer::norm(std::string_view name) {
  RmsNorm* found = nullptr;
  for_each_norm([&](std::string_view other, RmsNorm& norm) {
    if (other == name) found = &norm;
  });
  TORCH_CHECK(found, "norm: ", std::string(name), " is no norm of a block");
  return *found;
}

QuantPoint& DecoderLayer::point(Site site) {
  switch (site) {
    case Site::kQkv:
      return self_attn.input;
    case Site::kQueryKey:
      return self_attn.k_cache;
    case Site::kValue:
      return self_attn.v_cache;
    case Site::kO:
      return self_attn.o_input;
    case Site::kGateUp:
      return mlp.input;
    case Site::kDown:
      return mlp.down_input;
    case Site::kResidual:
      throw_missing(site, "quant point");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Site");
}
const QuantPoint& DecoderLayer::point(Site site) const { return const_cast<DecoderLayer&>(*this).point(site); }

RmsNorm& DecoderLayer::norm(Site site) {
  if (site_info(site).norm.empty()) throw_missing(site, "norm");
  return norm(site_info(site).norm);
}
const RmsNorm& DecoderLayer::norm(Site site) const { return const_cast<DecoderLayer&>(*this).norm(site); }

Transform& DecoderLayer::transform(Site site) {
  switch (site) {
    case Site::kQkv:
      return self_attn.input_transform;
    case Site::kQueryKey:
      return self_attn.query_key_transform;
    case Site::kO:
      return self_attn.o_transform;
    case Site::kGateUp:
      return mlp.input_transform;
    case Site::kDown:
      return mlp.down_transform;
    case Site::kResidual:
    case Site::kValue:
      throw_missing(site, "online transform");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Site");
}
const Transform& DecoderLayer::transform(Site site) const { return const_cast<DecoderLayer&>(*this).transform(site); }

SiteShape DecoderLayer::shape(Site site) const {
  const SiteInfo& info = site_info(site);
  if (info.cache) return {self_attn.num_kv_heads, self_attn.num_kv_heads * self_attn.head_dim};
  return {1, linear(info.readers[0]).weight.size(1)};
}

}  // namespace baseq
