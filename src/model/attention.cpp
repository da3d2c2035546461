#include <ATen/ATen.h>

#include <cmath>

#include "../integer/prepared_linear.h"
#include "../integer/rows.h"
#include "block_cache.h"
#include "exact_transform.h"
#include "learned_attention.h"
#include "prepared_block.h"

namespace baseq {
namespace {

/// Attention over the caches of sequences whose rows lie one after the other in q, k and v, [1, rows, heads, head_dim].
Tensor attend_cached(const Attention& attention, const CachedRows& cached, const Tensor& q, const Tensor& k,
                     const Tensor& v) {
  std::vector<Tensor> parts;
  std::vector<PagedRows> pages;
  int64_t begin = 0;
  for (size_t i = 0; i < cached.caches.size(); ++i) {
    const int64_t rows = cached.rows[i], length = cached.caches[i]->length();
    BlockCache& block = cached.caches[i]->block(cached.block);
    if (auto* paged = dynamic_cast<PagedBlockCache*>(&block)) {
      pages.push_back({paged, length, begin, rows});
    } else {
      const auto part = [&](const Tensor& of) { return of[0].narrow(0, begin, rows); };
      parts.push_back(dynamic_cast<FloatBlockCache&>(block).attend(attention, length, part(q), part(k), part(v)));
    }
    begin += rows;
  }
  TORCH_CHECK(parts.empty() || pages.empty(), "Attention: caches of different kinds in one forward pass");
  if (!pages.empty())
    return attend_pages(attention, pages, q[0].flatten(1), k[0].flatten(1), v[0].flatten(1)).unsqueeze(0);
  return (parts.size() == 1 ? parts[0] : at::cat(parts)).unsqueeze(0);
}

/// The same bits without a cache: each of the batch gets one that is let go of.
Tensor attend_in_pages(const Attention& attention, const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t batch = q.size(0), seq = q.size(1);
  std::vector<std::unique_ptr<PagedBlockCache>> caches;
  std::vector<PagedRows> sequences;
  for (int64_t i = 0; i < batch; ++i) {
    caches.push_back(std::make_unique<PagedBlockCache>(attention.num_kv_heads, attention.head_dim,
                                                       cache_grid(attention), kPagedFloats));
    sequences.push_back({caches.back().get(), 0, i * seq, seq});
  }
  const auto rows = [&](const Tensor& of) { return of.reshape({batch * seq, -1}); };
  return attend_pages(attention, sequences, rows(q), rows(k), rows(v)).view({batch, seq, -1});
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
  // Other devices have kernels whose gradients differ from run to run.
  const bool learning = v.requires_grad() && (products != q.scalar_type() || !q.is_cpu()) && !mask;
  const double default_scaling = 1 / std::sqrt(static_cast<double>(attention.head_dim));
  bool grouped = attention.num_heads != attention.num_kv_heads;
  if (grouped && !learning && !q.is_cpu()) {
    // CUDA's kernels that hold no matrix of scores take float32 only without groups.
    k = k.repeat_interleave(attention.num_heads / attention.num_kv_heads, 1);
    v = v.repeat_interleave(attention.num_heads / attention.num_kv_heads, 1);
    grouped = false;
  }
  const Tensor attended = learning ? learned_attention(q, k, v, attention.scaling.value_or(default_scaling), products)
                                   : at::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0,
                                                                      /*is_causal=*/!mask, attention.scaling,
                                                                      /*enable_gqa=*/grouped);
  return attended.transpose(1, 2).reshape({batch, seq, attention.num_heads * attention.head_dim});
}

/// Of q or k, [batch, seq, heads, head_dim], which is changed.
void rotate_exactly(Tensor& x, const RotaryEmbedding& rope) {
  const int64_t half = rope.cos.size(1) / 2, batch = x.size(0), seq = x.size(1);
  const auto table = [&](const Tensor& of) {
    const Tensor part = of.narrow(0, 0, seq).narrow(1, 0, half);
    return batch == 1 ? part : part.repeat({batch, 1});
  };
  Tensor rows = x.view({batch * seq, x.size(2), x.size(3)});
  rope_rows(rows, table(rope.cos), table(rope.sin), integer_kernels());
}

/// [batch, seq, features] as [batch, seq, heads, head_dim], with a norm of each head if it has a weight.
Tensor in_heads(const Tensor& x, const RmsNorm& norm, int64_t head_dim) {
  const Tensor heads = x.view({x.size(0), x.size(1), -1, head_dim});
  return norm.weight.defined() ? norm.forward(heads) : heads;
}

}  // namespace

Tensor Attention::query(const LinearInput& x) const { return in_heads(q_proj.forward(x), q_norm, head_dim); }

Tensor Attention::heads(const LinearInput& x, const RotaryEmbedding& rope, const CachedRows* cached) const {
  const std::vector<Tensor> projected = forward_together({&q_proj, &k_proj, &v_proj}, x);
  Tensor q = in_heads(projected[0], q_norm, head_dim), k = in_heads(projected[1], k_norm, head_dim);
  const Tensor v = in_heads(projected[2], {}, head_dim);
  if (use_rope && exact) {
    rotate_exactly(q, rope);
    rotate_exactly(k, rope);
  } else if (use_rope) {
    q = rope.forward(q);
    k = rope.forward(k);
  }
  q = exact ? exact_transform(query_key_transform, q, /*inverse_transpose=*/true)
            : apply_inverse_transpose(query_key_transform, q);
  k = exact ? exact_transform(query_key_transform, k) : apply_transform(query_key_transform, k);
  const at::ScalarType products = v_proj.weight.defined() ? v_proj.weight.scalar_type() : q.scalar_type();
  const Tensor attended = cached != nullptr ? attend_cached(*this, *cached, q, k, v)
                          : exact && has_pages(cache_grid(*this), head_dim)
                              ? attend_in_pages(*this, q, k, v)
                              : attend_from_start(*this, q, k, v, products);
  return exact ? exact_transform(o_transform, attended) : apply_transform(o_transform, attended);
}

}  // namespace baseq
