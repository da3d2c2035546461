#include "balance.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "../quant/finite.h"
#include "pipeline/statistics.h"

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

Tensor column_energy(const DecoderLayer& layer, Site site) {
  Tensor energy;
  for (const std::string_view reader : site_info(site).readers) {
    const Tensor sum = layer.linear(reader).weight.to(at::kDouble).square().sum(0);
    energy = energy.defined() ? energy + sum : sum;
  }
  return energy;
}

/// f applied to the eigenvalues of symmetric matrices; NaN for what is not finite, which has none.
template <class Fn>
Tensor spectral(const Tensor& matrix, Fn&& fn) {
  if (!all_finite(matrix)) return at::full_like(matrix, std::numeric_limits<double>::quiet_NaN());
  const auto [values, vectors] = at::linalg_eigh(matrix);
  const Tensor floor = values.amax(-1, /*keepdim=*/true) * 1e-12;
  return at::matmul(vectors * fn(at::maximum(values, floor)).unsqueeze(-2), vectors.transpose(-1, -2));
}

/// A factor; none where every one is as good as the identity; or known to be impossible, without finite moments.
struct Answer {
  std::optional<Factor> factor{};
  bool finite = true;
};

Answer scale_answer(const Tensor& scale) {
  if (!all_finite(scale)) return {.finite = false};
  return {.factor = scale_factor(scale, scale.reciprocal())};
}

/// @param rotary_dim the features of a head that RoPE turns, the first ones; the others have no partner
Answer balance_query_key(const DecoderLayer& layer, const Moments& key, const Moments& query, int64_t rotary_dim) {
  const Attention& attention = layer.self_attn;
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
  if (attention.q_norm.weight.defined()) {
    pair_k = pair_k.sum(0, /*keepdim=*/true);
    pair_q = pair_q.sum(0, /*keepdim=*/true);
  }
  const Tensor logarithm = 0.25 * (floored(pair_q).log() - floored(pair_k).log());
  const Tensor pair_scale = (logarithm - logarithm.mean(1, /*keepdim=*/true)).exp();
  const Tensor turned = pair_scale.narrow(1, 0, half);
  const Tensor scale = at::cat({turned, turned, pair_scale.narrow(1, half, dim - rotary_dim)}, 1);  // [kv or 1, dim]
  return scale_answer(scale.expand({kv, dim}).reshape({-1}));
}

Answer balance_values(const DecoderLayer& layer, const Moments& input) {
  const Attention& attention = layer.self_attn;
  const Tensor o = attention.o_proj.weight.to(at::kDouble);
  // Values that are always the same, or that nothing reads: every T is as good as the identity.
  const double variance = input.variance.mean().item<double>(), mean_square = input.mean.square().mean().item<double>();
  if (variance <= kConstant * mean_square || !o.any().item<bool>()) return {};
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
  if (!all_finite(c) || !all_finite(b)) return {.finite = false};
  const Tensor mean = geometric_mean(at::linalg_inv(c), b);
  const Tensor matrices = spectral(mean, [](const Tensor& values) { return values.sqrt(); });
  if (!all_finite(matrices)) return {.finite = false};
  return {.factor = matrix_factor(matrices, at::linalg_inv(matrices))};
}

Answer balance_site(const DecoderLayer& layer, Site site, const BlockMoments& moments, int64_t rotary_dim) {
  switch (site) {
    case Site::kQkv:
    case Site::kGateUp:
    case Site::kDown:
      return scale_answer(balancing_scale(moments.at(site).variance, column_energy(layer, site)));
    case Site::kQueryKey:
      return balance_query_key(layer, moments.at(site), moments.query, layer.self_attn.use_rope ? rotary_dim : 0);
    case Site::kValue:
      return balance_values(layer, moments.at(Site::kO));
    case Site::kResidual:
    case Site::kO:
      break;
  }
  TORCH_CHECK(false, "balance: there is no closed form at ", std::string(site_info(site).name));
}

}  // namespace

Tensor geometric_mean(const Tensor& a, const Tensor& b) {
  const auto root = [](const Tensor& values) { return values.sqrt(); };
  const Tensor half = spectral(a, root);
  const Tensor inverse_half = spectral(a, [](const Tensor& values) { return values.rsqrt(); });
  const Tensor middle = at::matmul(at::matmul(inverse_half, b), inverse_half);
  return at::matmul(at::matmul(half, spectral((middle + middle.transpose(-1, -2)) / 2, root)), half);
}

Balanced balance(const DecoderLayer& layer, const std::vector<Site>& at, const BlockInputs& inputs,
                 const Tensor& weights) {
  const c10::NoGradGuard no_grad;
  const bool values = std::find(at.begin(), at.end(), Site::kValue) != at.end();
  const BlockMoments moments =
      measure_block(layer, inputs.full_precision, inputs.rope, weights, {.with_o_covariance = values}, inputs.pass);
  Balanced balanced;
  for (const Site site : at) {
    Answer answer = balance_site(layer, site, moments, inputs.rope.cos.size(-1));
    if (!answer.finite) balanced.left_out.push_back(site);
    if (answer.factor) balanced.factors.emplace(site, std::move(*answer.factor));
  }
  return balanced;
}

}  // namespace baseq
