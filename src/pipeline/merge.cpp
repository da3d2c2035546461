#include "baseq/pipeline/merge.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

/// The input of every reader of `site` becomes x T.
void transform_readers(DecoderLayer& layer, Site site, const Factor& factor) {
  for (const std::string_view name : site_info(site).readers) {
    Linear& linear = layer.linear(name);
    linear.weight = apply_inverse_transpose({factor}, linear.weight);
  }
}

/// The output of `linear` becomes y H.
void rotate_output(Linear& linear) {
  linear.weight = hadamard_transform(linear.weight.t().contiguous()).t().contiguous();
  if (linear.bias.defined()) linear.bias = hadamard_transform(linear.bias);
}

}  // namespace

void fuse_norm_gains(DecoderLayer& layer) {
  for (const SiteInfo& info : sites()) {
    if (info.norm.empty()) continue;
    RmsNorm& norm = layer.norm(info.site);
    for (const std::string_view name : info.readers) {
      Linear& linear = layer.linear(name);
      linear.weight = linear.weight * norm.weight;
    }
    norm.weight = at::ones_like(norm.weight);
  }
}

void rotate_residual(DecoderLayer& layer) {
  transform_readers(layer, Site::kResidual, hadamard_factor(layer.shape(Site::kResidual).features));
  for (const std::string_view name : site_info(Site::kResidual).writers) rotate_output(layer.linear(name));
}

void transform_values(DecoderLayer& layer, const Tensor& matrices, const Tensor& inverse_transposes) {
  Attention& attention = layer.self_attn;
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim;
  TORCH_CHECK(matrices.sizes() == at::IntArrayRef({kv, dim, dim}) && inverse_transposes.sizes() == matrices.sizes(),
              "transform_values: expected matrices of shape ", at::IntArrayRef({kv, dim, dim}), ", got ",
              matrices.sizes(), " and ", inverse_transposes.sizes());
  Tensor& v = attention.v_proj.weight;  // [kv * dim, hidden]; every head's rows become T^T W
  v = at::matmul(matrices.transpose(1, 2), v.view({kv, dim, -1})).reshape(v.sizes());
  if (Tensor& bias = attention.v_proj.bias; bias.defined()) {
    bias = at::matmul(bias.view({kv, 1, dim}), matrices).reshape({kv * dim});
  }
  // Every query head of a group reads the values of its key/value head.
  Tensor& o = attention.o_proj.weight;                                          // [hidden, heads * dim]
  const Tensor heads = o.view({o.size(0), kv, -1, dim}).permute({1, 2, 0, 3});  // [kv, group, hidden, dim]
  o = at::matmul(heads, inverse_transposes.unsqueeze(1)).permute({2, 0, 1, 3}).reshape(o.sizes());
}

void rotate_values(DecoderLayer& layer) {
  const Attention& attention = layer.self_attn;
  const Tensor identity = at::eye(attention.head_dim, attention.v_proj.weight.options());
  const Tensor matrices = hadamard_transform(identity).expand({attention.num_kv_heads, -1, -1});
  transform_values(layer, matrices, matrices);
}

void transform_online(DecoderLayer& layer, Site site, const Factor& factor) {
  transform_readers(layer, site, factor);
  layer.transform(site).push_back(factor);
}

void merge_down_scale(DecoderLayer& layer) {
  Mlp& mlp = layer.mlp;
  if (!mlp.down_scale.defined()) return;
  mlp.up_proj.weight = mlp.up_proj.weight * mlp.down_scale.unsqueeze(1);
  if (mlp.up_proj.bias.defined()) mlp.up_proj.bias = mlp.up_proj.bias * mlp.down_scale;
  mlp.down_scale = Tensor{};
}

void apply_hadamards(DecoderLayer& layer, const Recipe::Transforms& transforms) {
  const auto rotate = [&](Site site) { transform_online(layer, site, hadamard_factor(layer.shape(site).features)); };
  if (transforms.value) rotate_values(layer);
  if (transforms.query_key) transform_online(layer, Site::kQueryKey, hadamard_factor(layer.self_attn.head_dim));
  if (transforms.o) rotate(Site::kO);
  if (transforms.down) rotate(Site::kDown);
  if (!transforms.input) return;
  rotate(Site::kQkv);
  rotate(Site::kGateUp);
}

namespace {

/// The bias takes what a constant addition to the input of `linear` would do.
void add_to_bias(Linear& linear, const Tensor& input) {
  const Tensor offset = at::matmul(linear.weight.to(at::kDouble), input.to(at::kDouble));
  linear.bias = (linear.bias.defined() ? linear.bias + offset : offset).to(linear.weight.options());
}

/// The rows of attention sum to one, so what the value cache subtracts is missing from o's input as the same vector for
/// every token: the shift of that point makes up for it, or the bias of o_proj where the point is off.
void merge_value_shift(Attention& attention) {
  QuantPoint& values = attention.v_cache;
  if (!values.shift.defined() || !values.add_shift_back) return;
  values.add_shift_back = false;
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim;
  Tensor missing = values.shift.view({kv, 1, dim}).expand({kv, attention.num_heads / kv, dim}).reshape({-1});
  missing = apply_transform(attention.o_transform, missing);
  QuantPoint& point = attention.o_input;
  if (point.gain.defined()) missing = missing * point.gain;
  if (point.enabled) {
    point.shift = point.shift.defined() ? point.shift - missing : -missing;
    point.add_shift_back = false;
  } else {
    add_to_bias(attention.o_proj, missing);
  }
}

}  // namespace

void merge_corrections(DecoderLayer& layer) {
  const c10::NoGradGuard no_grad;
  for (const SiteInfo& info : sites()) {
    if (!info.is_input()) continue;
    QuantPoint& point = layer.point(info.site);
    if (!point.shift.defined() || !point.add_shift_back) continue;
    for (const std::string_view name : info.readers) add_to_bias(layer.linear(name), point.shift);
    point.add_shift_back = false;
  }
  merge_value_shift(layer.self_attn);
  for (const SiteInfo& info : sites()) {
    if (info.norm.empty() || !layer.transform(info.site).empty()) continue;
    RmsNorm& norm = layer.norm(info.site);
    Tensor& gain = layer.point(info.site).gain;
    if (!gain.defined()) continue;
    norm.weight = norm.weight * gain;
    gain = Tensor{};
  }
}

}  // namespace baseq
