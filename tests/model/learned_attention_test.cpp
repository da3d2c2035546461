#include "../../src/model/learned_attention.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <tuple>
#include <vector>

namespace baseq {
namespace {

struct Heads {
  Tensor q, k, v;
};

Heads random_heads(int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq, int64_t dim, at::ScalarType dtype) {
  const auto leaf = [&](int64_t n) { return at::randn({batch, n, seq, dim}, dtype).requires_grad_(true); };
  return {leaf(heads), leaf(kv_heads), leaf(kv_heads)};
}

/// The output and the gradients of q, k, v for the loss sum(out * direction).
template <class Fn>
std::vector<Tensor> evaluate(const Heads& heads, const Tensor& direction, Fn&& attention) {
  const at::AutoGradMode with_grad(true);
  for (const Tensor& x : {heads.q, heads.k, heads.v}) x.mutable_grad() = Tensor();
  const Tensor out = attention(heads.q, heads.k, heads.v);
  (out * direction).sum().backward();
  return {out.detach(), heads.q.grad(), heads.k.grad(), heads.v.grad()};
}

Tensor reference(const Tensor& q, const Tensor& k, const Tensor& v, double scaling) {
  return at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true, scaling, /*enable_gqa=*/true);
}

TEST(LearnedAttention, EqualsScaledDotProductAttentionInFloat64) {
  at::manual_seed(1);
  const int64_t shapes[][5] = {{1, 4, 4, 1, 8}, {2, 6, 2, 37, 16}, {1, 3, 1, 128, 8}, {2, 4, 2, 300, 8}};
  for (const auto& [batch, num_heads, kv_heads, seq, dim] : shapes) {
    const Heads heads = random_heads(batch, num_heads, kv_heads, seq, dim, at::kDouble);
    const Tensor direction = at::randn(heads.q.sizes(), at::kDouble);
    const auto ours = evaluate(heads, direction, [](const Tensor& q, const Tensor& k, const Tensor& v) {
      return learned_attention(q, k, v, 0.3, at::kDouble);
    });
    const auto expected = evaluate(
        heads, direction, [](const Tensor& q, const Tensor& k, const Tensor& v) { return reference(q, k, v, 0.3); });
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_TRUE(at::allclose(ours[i], expected[i], 1e-11, 1e-11)) << "tensor " << i << ", seq " << seq;
    }
  }
}

TEST(LearnedAttention, Bfloat16ProductsStayWithinTheirRounding) {
  at::manual_seed(2);
  const Heads heads = random_heads(1, 6, 2, 200, 32, at::kFloat);
  const Tensor direction = at::randn(heads.q.sizes());
  const auto ours = evaluate(heads, direction, [](const Tensor& q, const Tensor& k, const Tensor& v) {
    return learned_attention(q, k, v, 0.2, at::kBFloat16);
  });
  const auto expected = evaluate(
      heads, direction, [](const Tensor& q, const Tensor& k, const Tensor& v) { return reference(q, k, v, 0.2); });
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_EQ(ours[i].scalar_type(), at::kFloat);
    EXPECT_LT(((ours[i] - expected[i]).norm() / expected[i].norm()).item<double>(), 0.01) << "tensor " << i;
  }
}

TEST(LearnedAttention, ComputesOnlyTheGradientsThatAreNeeded) {
  Heads heads = random_heads(1, 4, 2, 20, 8, at::kDouble);
  const Tensor direction = at::randn(heads.q.sizes(), at::kDouble);
  const auto attention = [](const Tensor& q, const Tensor& k, const Tensor& v) {
    return learned_attention(q, k, v, 0.3, at::kDouble);
  };
  const Tensor v_grad = evaluate(heads, direction, attention)[3].clone();
  heads.q.requires_grad_(false);
  heads.k.requires_grad_(false);
  const auto only_values = evaluate(heads, direction, attention);
  EXPECT_FALSE(only_values[1].defined());
  EXPECT_FALSE(only_values[2].defined());
  EXPECT_TRUE(at::equal(only_values[3], v_grad));
}

TEST(LearnedAttention, ShapesThatDoNotFitAreRefused) {
  const Tensor q = at::zeros({1, 4, 5, 8}), k = at::zeros({1, 2, 5, 8});
  for (const auto& [queries, keys, values] :
       std::vector<std::tuple<Tensor, Tensor, Tensor>>{{q[0], k, k},
                                                       {q, k, k.narrow(2, 0, 4)},
                                                       {q, k.narrow(2, 0, 4), k.narrow(2, 0, 4)},
                                                       {q.narrow(1, 0, 3), k, k},
                                                       {q, k.narrow(1, 0, 0), k.narrow(1, 0, 0)},
                                                       {q, k.narrow(3, 0, 4), k.narrow(3, 0, 4)}}) {
    EXPECT_THROW(learned_attention(queries, keys, values, 1, at::kFloat), c10::Error);
  }
}

}  // namespace
}  // namespace baseq
