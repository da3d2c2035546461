#include "block_cache.h"

#include <ATen/ATen.h>

namespace baseq {

FloatBlockCache::FloatBlockCache(const ModelConfig& config, const CacheFormat& format)
    : keys_(at::empty({config.num_key_value_heads, 0, config.head_dim}, format.compute.dtype(format.stored))),
      values_(keys_.clone()) {}

void FloatBlockCache::reserve(int64_t tokens) {
  for (Tensor* stored : {&keys_, &values_}) {
    const Tensor larger = at::empty({stored->size(0), tokens, stored->size(2)}, stored->options());
    larger.narrow(1, 0, stored->size(1)).copy_(*stored);
    *stored = larger;
  }
}

Tensor FloatBlockCache::attend(const Attention& attention, int64_t length, const Tensor& q, const Tensor& k,
                               const Tensor& v) {
  const int64_t tokens = q.size(0), window = attention.sliding_window;
  const int64_t features = attention.num_kv_heads * attention.head_dim;
  const auto store = [&](const Tensor& stored, const QuantPoint& point, const Tensor& x) {
    const Tensor kept = point.forward(x.reshape({1, tokens, features})).view(x.sizes());
    stored.narrow(1, length, tokens).copy_(kept.transpose(0, 1));
  };
  store(keys_, attention.k_cache, k);
  store(values_, attention.v_cache, v);
  const int64_t total = length + tokens, first = window > 0 ? std::max<int64_t>(0, length - window + 1) : 0;
  const auto seen = [&](const Tensor& stored) {
    return stored.narrow(1, first, total - first).unsqueeze(0).to(q.scalar_type());
  };
  std::optional<Tensor> mask;
  const bool causal = length == 0 && (window == 0 || window >= tokens) && tokens > 1;
  if (tokens > 1 && !causal) {
    mask = at::ones({tokens, total - first}, q.options().dtype(at::kBool)).tril_(length - first);
    if (window > 0) mask->triu_(length - first + 1 - window);
  }
  return at::scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), seen(keys_), seen(values_), mask,
                                          /*dropout_p=*/0.0, causal, attention.scaling,
                                          /*enable_gqa=*/attention.num_heads != attention.num_kv_heads)[0]
      .transpose(0, 1)
      .reshape({tokens, attention.num_heads * attention.head_dim});
}

}  // namespace baseq
