#include "merge.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace baseq {
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

void transform_residual(DecoderLayer& layer, const Transform& transform) {
  for (const std::string_view name : site_info(Site::kResidual).readers) {
    Tensor& weight = layer.linear(name).weight;
    weight = apply_inverse_transpose(transform, weight);
  }
  for (const std::string_view name : site_info(Site::kResidual).writers) {
    Linear& linear = layer.linear(name);
    linear.weight = apply_transform(transform, linear.weight.t().contiguous()).t().contiguous();
    if (linear.bias.defined()) linear.bias = apply_transform(transform, linear.bias);
  }
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
