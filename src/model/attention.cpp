#include <ATen/ATen.h>

#include <cmath>

#include "block_cache.h"
#include "learned_attention.h"

namespace baseq {
namespace {

/// Attention over the caches of sequences whose rows lie one after the other in q, k and v, [1, rows, heads, head_dim].
Tensor attend_cached(const Attention& attention, const CachedRows& cached, const Tensor& q, const Tensor& k,
                     const Tensor& v) {
  std::vector<Tensor> parts;
  int64_t begin = 0;
  for (size_t i = 0; i < cached.caches.size(); ++i) {
    const int64_t rows = cached.rows[i];
    const auto part = [&](const Tensor& of) { return of[0].narrow(0, begin, rows); };
    const KvCache& cache = *cached.caches[i];
    parts.push_back(cache.block(cached.block).attend(attention, cache.length(), part(q), part(k), part(v)));
    begin += rows;
  }
  return (parts.size() == 1 ? parts[0] : at::cat(parts)).unsqueeze(0);
}

/// Of whole sequences, [batch, seq, heads, head_dim] each.
Tensor attend_from_start(const Attention& attention, Tensor q, Tensor k, Tensor v, at::ScalarType products) {
  const auto batch = q.size(0), seq = q.size(1), kv_features = attention.num_kv_heads * attention.head_dim;
  k = attention.k_cache.forward(k.reshape({batch, seq, kv_features})).view(k.sizes());
  v = attention.v_cache.forward(v.reshape({batch, seq, kv_features})).view(v.sizes());
  // A window as long as the sequence hides nothing, and without a mask attention is faster.
  std::optional<Tensor> mask;
  const int64_t window = attention.sliding_window;
  if (window > 0 && window < seq) {
    mask = at::ones({seq, seq}, q.options().dtype(at::kBool)).tril_().triu_(1 - window);
  }
  q = q.transpose(1, 2);
  k = k.transpose(1, 2);
  v = v.transpose(1, 2);
  const bool learning = v.requires_grad() && products != q.scalar_type() && !mask;
  const double default_scaling = 1 / std::sqrt(static_cast<double>(attention.head_dim));
  const Tensor attended =
      learning
          ? learned_attention(q, k, v, attention.scaling.value_or(default_scaling), products)
          : at::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0, /*is_causal=*/!mask, attention.scaling,
                                             /*enable_gqa=*/attention.num_heads != attention.num_kv_heads);
  return attended.transpose(1, 2).reshape({batch, seq, attention.num_heads * attention.head_dim});
}

}  // namespace

Tensor Attention::query(const LinearInput& x) const {
  const at::IntArrayRef sizes = x.sizes();
  const Tensor q = q_proj.forward(x).view({sizes[0], sizes[1], num_heads, head_dim});
  return q_norm.weight.defined() ? q_norm.forward(q) : q;
}

Tensor Attention::heads(const LinearInput& x, const RotaryEmbedding& rope, const CachedRows* cached) const {
  const std::vector<int64_t> kv_sizes{x.sizes()[0], x.sizes()[1], num_kv_heads, head_dim};
  Tensor q = query(x), k = k_proj.forward(x).view(kv_sizes);
  if (k_norm.weight.defined()) k = k_norm.forward(k);
  const Tensor v = v_proj.forward(x).view(kv_sizes);
  if (use_rope) {
    q = rope.forward(q);
    k = rope.forward(k);
  }
  q = apply_inverse_transpose(query_key_transform, q);
  k = apply_transform(query_key_transform, k);
  const at::ScalarType products = v_proj.weight.defined() ? v_proj.weight.scalar_type() : q.scalar_type();
  return apply_transform(o_transform, cached != nullptr ? attend_cached(*this, *cached, q, k, v)
                                                        : attend_from_start(*this, q, k, v, products));
}

}  // namespace baseq
