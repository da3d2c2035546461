#include "baseq/pipeline/merge.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

/// The input of `linear` becomes x H.
void rotate_input(Linear& linear) { linear.weight = hadamard_transform(linear.weight); }

/// The output of `linear` becomes y H.
void rotate_output(Linear& linear) {
  linear.weight = hadamard_transform(linear.weight.t().contiguous()).t().contiguous();
  if (linear.bias.defined()) linear.bias = hadamard_transform(linear.bias);
}

}  // namespace

void fuse_norm_gains(DecoderLayer& layer) {
  const auto fuse = [](RmsNorm& norm, std::initializer_list<Linear*> readers) {
    for (Linear* linear : readers) linear->weight = linear->weight * norm.weight;
    norm.weight = at::ones_like(norm.weight);
  };
  fuse(layer.input_layernorm, {&layer.self_attn.q_proj, &layer.self_attn.k_proj, &layer.self_attn.v_proj});
  fuse(layer.post_attention_layernorm, {&layer.mlp.gate_proj, &layer.mlp.up_proj});
}

void rotate_residual(DecoderLayer& layer) {
  for (Linear* linear : {&layer.self_attn.q_proj, &layer.self_attn.k_proj, &layer.self_attn.v_proj,
                         &layer.mlp.gate_proj, &layer.mlp.up_proj}) {
    rotate_input(*linear);
  }
  rotate_output(layer.self_attn.o_proj);
  rotate_output(layer.mlp.down_proj);
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

void rotate_query_key(DecoderLayer& layer) { layer.self_attn.query_key_hadamard = true; }

void rotate_down_input(DecoderLayer& layer) {
  rotate_input(layer.mlp.down_proj);
  layer.mlp.down_hadamard = true;
}

void rotate_o_input(DecoderLayer& layer) {
  rotate_input(layer.self_attn.o_proj);
  layer.self_attn.o_hadamard = true;
}

void rotate_norm_outputs(DecoderLayer& layer) {
  for (Linear* linear : {&layer.self_attn.q_proj, &layer.self_attn.k_proj, &layer.self_attn.v_proj,
                         &layer.mlp.gate_proj, &layer.mlp.up_proj}) {
    rotate_input(*linear);
  }
  layer.self_attn.input_hadamard = true;
  layer.mlp.input_hadamard = true;
}

void merge_down_scale(DecoderLayer& layer) {
  Mlp& mlp = layer.mlp;
  if (!mlp.down_scale.defined()) return;
  mlp.up_proj.weight = mlp.up_proj.weight * mlp.down_scale.unsqueeze(1);
  if (mlp.up_proj.bias.defined()) mlp.up_proj.bias = mlp.up_proj.bias * mlp.down_scale;
  mlp.down_scale = Tensor{};
}

void apply_hadamards(DecoderLayer& layer, const Recipe::Transforms& transforms) {
  if (transforms.value) rotate_values(layer);
  if (transforms.query_key) rotate_query_key(layer);
  if (transforms.o) rotate_o_input(layer);
  if (transforms.down) rotate_down_input(layer);
  if (transforms.input) rotate_norm_outputs(layer);
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
  if (attention.o_hadamard) missing = hadamard_transform(missing);
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
  const auto merge = [](QuantPoint& point, std::initializer_list<Linear*> readers) {
    if (!point.shift.defined() || !point.add_shift_back) return;
    for (Linear* linear : readers) add_to_bias(*linear, point.shift);
    point.add_shift_back = false;
  };
  Attention& attention = layer.self_attn;
  merge(attention.input, {&attention.q_proj, &attention.k_proj, &attention.v_proj});
  merge(attention.o_input, {&attention.o_proj});
  merge(layer.mlp.input, {&layer.mlp.gate_proj, &layer.mlp.up_proj});
  merge(layer.mlp.down_input, {&layer.mlp.down_proj});
  merge_value_shift(attention);
  const auto merge_gain = [](RmsNorm& norm, QuantPoint& point, bool hadamard) {
    if (hadamard || !point.gain.defined()) return;
    norm.weight = norm.weight * point.gain;
    point.gain = Tensor{};
  };
  merge_gain(layer.input_layernorm, attention.input, attention.input_hadamard);
  merge_gain(layer.post_attention_layernorm, layer.mlp.input, layer.mlp.input_hadamard);
}

}  // namespace baseq
