#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <cmath>

#include "../integer/prepared_linear.h"
#include "block_cache.h"
#include "prepared_block.h"

namespace baseq {
namespace {

/// Values that a thread rounds at least.
constexpr int64_t kValuesPerThread = 1 << 14;

/// Of one head; 1 where the point has none.
float clip_of(const QuantPoint& point, int64_t head) {
  if (!point.clip.defined()) return 1;
  return point.clip.const_data_ptr<float>()[point.clip.numel() == 1 ? 0 : head];
}

}  // namespace

PagedBlockCache::PagedBlockCache(int64_t num_kv_heads, int64_t head_dim, const std::optional<QuantSpec>& grid,
                                 at::ScalarType stored) {
  std::optional<QuantSpec> of_head = grid;
  if (of_head) {
    of_head->strategy = Strategy::kToken;
    of_head->group_size = 0;
  }
  for (int64_t i = 0; i < num_kv_heads; ++i) heads_.emplace_back(head_dim, of_head, stored);
}

int64_t PagedBlockCache::bytes() const {
  int64_t total = 0;
  for (const HeadCache& head : heads_) total += head.bytes();
  return total;
}

std::optional<QuantSpec> cache_grid(const Attention& attention) {
  return attention.k_cache.enabled ? std::optional(attention.k_cache.spec) : std::nullopt;
}

Tensor attend_pages(const Attention& attention, const std::vector<PagedRows>& sequences, const Tensor& q,
                    const Tensor& k, const Tensor& v) {
  const int64_t dim = attention.head_dim, kv_heads = attention.num_kv_heads, group = attention.num_heads / kv_heads;
  const int64_t features = attention.num_heads * dim;
  const Tensor keys = with_gain_and_shift(attention.k_cache, k), values = with_gain_and_shift(attention.v_cache, v);
  TORCH_CHECK(q.stride(1) == 1 && keys.stride(1) == 1 && values.stride(1) == 1, "attend_pages: rows have gaps");
  Tensor out = at::detail::empty_cpu(q.sizes(), at::kFloat);
  const auto* queries = q.const_data_ptr<float>();
  auto* results = out.mutable_data_ptr<float>();
  std::vector<AttentionRequest> requests;
  for (const PagedRows& sequence : sequences) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t first_feature = head * group * dim;
      requests.push_back({.cache = &sequence.cache->heads()[static_cast<size_t>(head)],
                          .queries = queries + sequence.first * q.stride(0) + first_feature,
                          .out = results + sequence.first * features + first_feature,
                          .rows = sequence.rows,
                          .heads = group,
                          .query_stride = q.stride(0),
                          .out_stride = features,
                          .first_position = sequence.length,
                          .window = attention.sliding_window,
                          .scaling = attention.scaling.value_or(1 / std::sqrt(static_cast<double>(dim)))});
    }
  }
  const auto count = static_cast<int64_t>(requests.size());
  const int64_t values_per_request = 1 + 2 * k.numel() / count;
  at::parallel_for(0, count, 1 + kValuesPerThread / values_per_request, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const PagedRows& sequence = sequences[static_cast<size_t>(i / kv_heads)];
      const int64_t head = i % kv_heads;
      const auto first = [&](const Tensor& of) {
        return of.const_data_ptr<float>() + sequence.first * of.stride(0) + head * dim;
      };
      HeadCache& cache = sequence.cache->heads()[static_cast<size_t>(head)];
      cache.truncate(sequence.length);  // what a forward pass that failed left
      cache.append({first(keys), keys.stride(0)}, {first(values), values.stride(0)}, sequence.rows,
                   clip_of(attention.k_cache, head), clip_of(attention.v_cache, head));
    }
  });
  attend(requests, integer_kernels());
  return out;
}

}  // namespace baseq
