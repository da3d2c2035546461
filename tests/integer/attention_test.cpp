#include "integer/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "baseq/quant/quantize.h"
#include "integer/prepared_linear.h"

namespace baseq {
namespace {

struct AttentionCase {
  int64_t bits;  ///< 0: floats
  bool symmetric;
  at::ScalarType dtype;
  int64_t head_dim, heads, tokens, window;
};
const AttentionCase kAttentionCases[] = {
    {4, false, at::kFloat, 64, 3, 200, 0},   {4, true, at::kFloat, 80, 1, 130, 0},
    {8, false, at::kFloat, 128, 4, 70, 40},  {8, true, at::kFloat, 96, 8, 150, 64},
    {3, false, at::kFloat, 32, 7, 129, 100}, {0, false, at::kHalf, 64, 3, 200, 0},
    {0, false, at::kFloat, 40, 2, 100, 33},
};

std::optional<QuantSpec> cache_grid_of(const AttentionCase& c) {
  if (c.bits == 0) return std::nullopt;
  return QuantSpec{.num_bits = c.bits, .symmetric = c.symmetric, .strategy = Strategy::kToken, .dynamic = true};
}

struct AttentionOperands {
  Tensor queries, keys, values;  ///< [tokens, heads, head_dim], [tokens, head_dim] twice
  explicit AttentionOperands(const AttentionCase& c)
      : queries(at::randn({c.tokens, c.heads, c.head_dim})),
        keys(at::randn({c.tokens, c.head_dim}) + 0.3),
        values(at::randn({c.tokens, c.head_dim}) - 0.2) {}
};

void append(HeadCache& cache, const AttentionOperands& x, int64_t begin, int64_t end) {
  const int64_t width = x.keys.size(1);
  cache.append({x.keys.const_data_ptr<float>() + begin * width, width},
               {x.values.const_data_ptr<float>() + begin * width, width}, end - begin, 0.95F, 0.9F);
}

/// Queries [begin, end), into `out` [tokens, heads, head_dim].
AttentionRequest request_for(const HeadCache& cache, const AttentionCase& c, const AttentionOperands& x, int64_t begin,
                             int64_t end, Tensor& out) {
  const int64_t width = c.heads * c.head_dim;
  return {.cache = &cache,
          .queries = x.queries.const_data_ptr<float>() + begin * width,
          .out = out.mutable_data_ptr<float>() + begin * width,
          .rows = end - begin,
          .heads = c.heads,
          .query_stride = width,
          .out_stride = width,
          .first_position = begin,
          .window = c.window,
          .scaling = 1 / std::sqrt(static_cast<double>(c.head_dim))};
}

/// As tokens come: `chunk` of them are appended, then attend.
Tensor in_chunks(const AttentionCase& c, const AttentionOperands& x, int64_t chunk, const IntegerKernels& kernels) {
  HeadCache cache(c.head_dim, cache_grid_of(c), c.dtype);
  Tensor out = at::full({c.tokens, c.heads, c.head_dim}, NAN);
  for (int64_t begin = 0; begin < c.tokens; begin += chunk) {
    const int64_t end = std::min(c.tokens, begin + chunk);
    append(cache, x, begin, end);
    attend(request_for(cache, c, x, begin, end, out), kernels);
  }
  return out;
}

TEST(Attention, IsThatOverTheDequantizedKeysAndValues) {
  at::manual_seed(1);
  for (const AttentionCase& c : kAttentionCases) {
    const AttentionOperands x(c);
    HeadCache cache(c.head_dim, cache_grid_of(c), c.dtype);
    append(cache, x, 0, c.tokens);
    Tensor out = at::empty({c.tokens, c.heads, c.head_dim}, at::kFloat);
    attend(request_for(cache, c, x, 0, c.tokens, out), integer_kernels());
    const Tensor keys = cache.dequantized_keys().to(at::kDouble), values = cache.dequantized_values().to(at::kDouble);
    Tensor mask = at::ones({c.tokens, c.tokens}, at::kBool).tril();
    if (c.window > 0) mask = mask.triu(1 - c.window);
    const Tensor scores =
        at::matmul(x.queries.to(at::kDouble).transpose(0, 1), keys.t()) / std::sqrt(static_cast<double>(c.head_dim));
    const Tensor weights = scores.masked_fill(mask.logical_not(), -INFINITY).softmax(-1);
    const Tensor expected = at::matmul(weights, values).transpose(0, 1);
    // 15 bits of a query move scores by up to 1e-4; floats are exact but for rounding.
    const double tolerance = c.bits > 0 ? 2e-4 : 5e-6;
    EXPECT_LT((out.to(at::kDouble) - expected).abs().max().item<double>(), tolerance) << c.bits << " " << c.head_dim;
  }
}

TEST(Attention, StoresTheCodesOfFakeQuantization) {
  at::manual_seed(2);
  for (const AttentionCase& c : kAttentionCases) {
    if (c.bits == 0) continue;
    const AttentionOperands x(c);
    HeadCache cache(c.head_dim, cache_grid_of(c), c.dtype);
    append(cache, x, 0, c.tokens);
    const auto expected = [&](const Tensor& values, double clip) {
      return fake_quantize_dynamic(values, *cache_grid_of(c), at::full({1, 1}, clip), {}, {}, false);
    };
    EXPECT_LT((cache.dequantized_keys() - expected(x.keys, 0.95)).abs().max().item<double>(), 1e-5);
    EXPECT_LT((cache.dequantized_values() - expected(x.values, 0.9)).abs().max().item<double>(), 1e-5);
  }
}

TEST(Attention, IsTheSameBitsForAnyChunksInstructionSetAndThreads) {
  at::manual_seed(3);
  const int threads = at::get_num_threads();
  for (const AttentionCase& c : kAttentionCases) {
    const AttentionOperands x(c);
    const Tensor expected = in_chunks(c, x, c.tokens, kScalarKernels);
    ASSERT_TRUE(expected.isfinite().all().item<bool>());
    for (int64_t k = 0; k < kNumIntegerKernels; ++k) {
      if (!kIntegerKernels[k]->supported()) continue;
      for (const int64_t chunk : {int64_t{1}, int64_t{7}, int64_t{64}, c.tokens}) {
        ASSERT_TRUE(in_chunks(c, x, chunk, *kIntegerKernels[k]).equal(expected))
            << kIntegerKernels[k]->name << ", chunks of " << chunk << ", " << c.bits << " bits";
      }
    }
    std::vector<HeadCache> caches;
    for (int i = 0; i < 5; ++i) append(caches.emplace_back(c.head_dim, cache_grid_of(c), c.dtype), x, 0, c.tokens);
    for (const int count : {1, 2, 3}) {
      at::set_num_threads(count);
      std::vector<Tensor> out(caches.size());
      std::vector<AttentionRequest> requests;
      for (size_t i = 0; i < caches.size(); ++i) {
        out[i] = at::empty_like(expected);
        requests.push_back(request_for(caches[i], c, x, 0, c.tokens, out[i]));
      }
      attend(requests, integer_kernels());
      for (const Tensor& of_one : out) EXPECT_TRUE(of_one.equal(expected)) << count << " threads";
    }
  }
  at::set_num_threads(threads);
}

TEST(Attention, ForgetsWhatIsTruncated) {
  at::manual_seed(4);
  const AttentionCase c = kAttentionCases[0];
  const AttentionOperands x(c), other(c);
  const Tensor expected = in_chunks(c, x, c.tokens, integer_kernels());
  HeadCache cache(c.head_dim, cache_grid_of(c), c.dtype);
  append(cache, x, 0, 70);
  append(cache, other, 70, 199);
  cache.truncate(70);
  EXPECT_EQ(cache.length(), 70);
  append(cache, x, 70, c.tokens);
  Tensor out = at::empty_like(expected);
  attend(request_for(cache, c, x, 0, c.tokens, out), integer_kernels());
  EXPECT_TRUE(out.equal(expected));
  EXPECT_THROW(cache.truncate(c.tokens + 1), c10::Error);
  EXPECT_THROW(attend(request_for(cache, c, x, 1, c.tokens + 1, out), integer_kernels()), c10::Error);
}

TEST(Attention, ATokenThatIsNotFiniteReachesOnlyLaterQueries) {
  at::manual_seed(5);
  for (const AttentionCase& c : {kAttentionCases[0], kAttentionCases[5]}) {
    AttentionOperands x(c);
    const Tensor expected = in_chunks(c, x, c.tokens, integer_kernels());
    x.keys[90][3] = std::numeric_limits<float>::infinity();
    x.values[90][5] = NAN;
    for (const int64_t chunk : {int64_t{1}, c.tokens}) {
      const Tensor out = in_chunks(c, x, chunk, integer_kernels());
      EXPECT_TRUE(out.narrow(0, 0, 90).equal(expected.narrow(0, 0, 90)));
      EXPECT_TRUE(out.narrow(0, 90, c.tokens - 90).isnan().any(-1).all().item<bool>());
    }
  }
}

TEST(Attention, TakesTheBytesOfItsCodes) {
  HeadCache cache(64, QuantSpec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true});
  const Tensor x = at::randn({128, 64});
  const HeadCache::Rows rows{x.const_data_ptr<float>(), 64};
  cache.append(rows, rows, 128);
  EXPECT_EQ(cache.bytes(), 128 * (64 + 4 * 4));
}

}  // namespace
}  // namespace baseq
