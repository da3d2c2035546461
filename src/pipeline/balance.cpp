#include "baseq/pipeline/balance.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <limits>

#include "../quant/finite.h"
#include "baseq/pipeline/merge.h"
#include "baseq/pipeline/statistics.h"

namespace baseq {
namespace {

/// Channels quieter than this share of the mean count as this loud: a scale must not blow up on a dead channel.
constexpr double kFloor = 1e-4;
/// Variances below this share of the squared means are what float32 leaves of a constant.
constexpr double kConstant = 1e-6;

Tensor floored(const Tensor& energy) { return energy.clamp_min(energy.mean() * kFloor + 1e-30); }

/// s with s^4 = w^2 / a^2, geometric mean 1.
Tensor balancing_scale(const Tensor& activation_energy, const Tensor& weight_energy) {
  const Tensor logarithm = 0.25 * (floored(weight_energy).log() - floored(activation_energy).log());
  return (logarithm - logarithm.mean()).exp();
}

Tensor column_energy(std::initializer_list<Linear*> readers) {
  Tensor energy;
  for (const Linear* linear : readers) {
    const Tensor sum = linear->weight.to(at::kDouble).square().sum(0);
    energy = energy.defined() ? energy + sum : sum;
  }
  return energy;
}

void scale_rows(Linear& linear, const Tensor& scale) {
  linear.weight = linear.weight * scale.unsqueeze(1).to(linear.weight.options());
  if (linear.bias.defined()) linear.bias = linear.bias * scale.to(linear.bias.options());
}

void scale_columns(Linear& linear, const Tensor& scale) {
  linear.weight = linear.weight * scale.to(linear.weight.options());
}

void scale_norm(RmsNorm& norm, const Tensor& scale) { norm.weight = norm.weight * scale.to(norm.weight.options()); }

/// f applied to the eigenvalues of symmetric matrices; NaN for what is not finite, which has none.
template <class Fn>
Tensor spectral(const Tensor& matrix, Fn&& fn) {
  if (!all_finite(matrix)) return at::full_like(matrix, std::numeric_limits<double>::quiet_NaN());
  const auto [values, vectors] = at::linalg_eigh(matrix);
  const Tensor floor = values.amax(-1, /*keepdim=*/true) * 1e-12;
  return at::matmul(vectors * fn(at::maximum(values, floor)).unsqueeze(-2), vectors.transpose(-1, -2));
}

// Each returns whether it knew what to do: without finite moments the layer stays as it is.

bool balance_norm(RmsNorm& norm, std::initializer_list<Linear*> readers, const Tensor& variance) {
  const Tensor scale = balancing_scale(variance, column_energy(readers));
  if (!all_finite(scale)) return false;
  scale_norm(norm, scale);
  for (Linear* linear : readers) scale_columns(*linear, scale.reciprocal());
  return true;
}

/// @param rotary_dim the features of a head that RoPE turns, the first ones; the others have no partner
bool balance_query_key(DecoderLayer& layer, const Moments& key, const Moments& query, int64_t rotary_dim) {
  Attention& attention = layer.self_attn;
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim, half = rotary_dim / 2;
  // [.., dim] -> [.., half + (dim - rotary_dim)], the energies of pairs and of features without a partner.
  const auto paired = [&](const Tensor& energy) {
    return at::cat(
        {energy.narrow(-1, 0, half) + energy.narrow(-1, half, half), energy.narrow(-1, rotary_dim, dim - rotary_dim)},
        -1);
  };
  // Rotation keeps a pair's energy: queries are measured before it.
  const Tensor query_energy = query.variance + query.mean.square();
  Tensor pair_k = paired(key.variance.view({kv, dim}));
  Tensor pair_q = paired(query_energy.view({kv, -1, dim}).sum(1));
  const bool in_norms = attention.q_norm.weight.defined();
  if (in_norms) {
    pair_k = pair_k.sum(0, /*keepdim=*/true);
    pair_q = pair_q.sum(0, /*keepdim=*/true);
  }
  const Tensor logarithm = 0.25 * (floored(pair_q).log() - floored(pair_k).log());
  const Tensor pair_scale = (logarithm - logarithm.mean(1, /*keepdim=*/true)).exp();
  if (!all_finite(pair_scale)) return false;
  const Tensor turned = pair_scale.narrow(1, 0, half);
  const Tensor scale = at::cat({turned, turned, pair_scale.narrow(1, half, dim - rotary_dim)}, 1);  // [kv or 1, dim]
  if (in_norms) {
    scale_norm(attention.k_norm, scale[0]);
    scale_norm(attention.q_norm, scale[0].reciprocal());
    return true;
  }
  scale_rows(attention.k_proj, scale.reshape({-1}));
  const int64_t group = attention.num_heads / kv;
  scale_rows(attention.q_proj, scale.unsqueeze(1).expand({kv, group, dim}).reshape({-1}).reciprocal());
  return true;
}

bool balance_values(DecoderLayer& layer, const Moments& input) {
  const Attention& attention = layer.self_attn;
  const Tensor o = attention.o_proj.weight.to(at::kDouble);
  // Values that are always the same, or that nothing reads: every T is as good as the identity.
  const double variance = input.variance.mean().item<double>(), mean_square = input.mean.square().mean().item<double>();
  if (variance <= kConstant * mean_square || !o.any().item<bool>()) return true;
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim;
  // The query heads of a group share T: their covariances and weights add up.
  const auto head_blocks = [&](const Tensor& matrix) {  // [heads * dim, heads * dim] -> [kv, dim, dim]
    const Tensor blocks = matrix.view({attention.num_heads, dim, attention.num_heads, dim}).diagonal(0, 0, 2);
    return blocks.permute({2, 0, 1}).reshape({kv, -1, dim, dim}).sum(1);
  };
  const auto regular = [&](Tensor matrix) {
    const Tensor mean = matrix.diagonal(0, -2, -1).mean();
    return matrix + at::eye(dim, matrix.options()) * (mean * kFloor);
  };
  const Tensor c = regular(head_blocks(input.covariance)), b = regular(head_blocks(at::matmul(o.t(), o)));
  if (!all_finite(c) || !all_finite(b)) return false;
  const Tensor mean = geometric_mean(at::linalg_inv(c), b);
  const Tensor matrices = spectral(mean, [](const Tensor& values) { return values.sqrt(); });
  if (!all_finite(matrices)) return false;
  const auto like = attention.v_proj.weight.options();
  transform_values(layer, matrices.to(like), at::linalg_inv(matrices).transpose(1, 2).to(like));
  return true;
}

bool balance_down(Mlp& mlp, const Tensor& variance) {
  const Tensor scale = balancing_scale(variance, column_energy({&mlp.down_proj}));
  if (!all_finite(scale)) return false;
  scale_rows(mlp.up_proj, scale);
  scale_columns(mlp.down_proj, scale.reciprocal());
  return true;
}

}  // namespace

Tensor geometric_mean(const Tensor& a, const Tensor& b) {
  const auto root = [](const Tensor& values) { return values.sqrt(); };
  const Tensor half = spectral(a, root);
  const Tensor inverse_half = spectral(a, [](const Tensor& values) { return values.rsqrt(); });
  const Tensor middle = at::matmul(at::matmul(inverse_half, b), inverse_half);
  return at::matmul(at::matmul(half, spectral((middle + middle.transpose(-1, -2)) / 2, root)), half);
}

std::vector<std::string> balance(DecoderLayer& layer, const Recipe::Transforms& transforms, const BlockInputs& inputs,
                                 const Tensor& weights) {
  const c10::NoGradGuard no_grad;
  if (!transforms.scale_norm && !transforms.scale_query_key && !transforms.scale_value && !transforms.scale_down)
    return {};
  const BlockMoments moments = measure_block(layer, inputs.full_precision, inputs.rope, weights, transforms.scale_value,
                                             Site::kDown, inputs.pass);
  std::vector<std::string> left_out;
  const auto note = [&](bool done, const char* what) {
    if (!done) left_out.emplace_back(what);
  };
  Attention& attention = layer.self_attn;
  if (transforms.scale_norm) {
    note(balance_norm(layer.input_layernorm, {&attention.q_proj, &attention.k_proj, &attention.v_proj},
                      moments.at(Site::kQkv).variance),
         "scale_norm of input_layernorm");
    note(balance_norm(layer.post_attention_layernorm, {&layer.mlp.gate_proj, &layer.mlp.up_proj},
                      moments.at(Site::kGateUp).variance),
         "scale_norm of post_attention_layernorm");
  }
  if (transforms.scale_query_key) {
    const int64_t rotary_dim = attention.use_rope ? inputs.rope.cos.size(-1) : 0;
    note(balance_query_key(layer, moments.at(Site::kQueryKey), moments.query, rotary_dim), "scale_query_key");
  }
  if (transforms.scale_value) note(balance_values(layer, moments.at(Site::kO)), "scale_value");
  if (transforms.scale_down) note(balance_down(layer.mlp, moments.at(Site::kDown).variance), "scale_down");
  return left_out;
}

}  // namespace baseq
