#include "../../src/quant/product.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

namespace baseq {
namespace {

Tensor random(at::IntArrayRef sizes) { return at::randn(sizes); }

TEST(Product, EqualsAProductInFloat64) {
  at::manual_seed(3);
  const c10::NoGradGuard no_grad;
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 33, 5}, {64, 128, 256}, {300, 576, 192}};
  for (const auto& [rows, in, out] : shapes) {
    const Tensor x = random({2, rows, in}), weight = random({out, in}), bias = random({out});
    const Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble));
    EXPECT_TRUE(at::allclose(linear_product(x, weight, bias).to(at::kDouble), expected, 1e-5, 1e-4));
    EXPECT_TRUE(at::allclose(linear_product(x, weight).to(at::kDouble), expected - bias, 1e-5, 1e-4));
    // Neither operand has to be contiguous.
    const Tensor a = random({in, rows}).t(), b = random({out, 2 * in}).t().slice(0, 0, 2 * in, 2);
    EXPECT_TRUE(
        at::allclose(matrix_product(a, b).to(at::kDouble), at::mm(a.to(at::kDouble), b.to(at::kDouble)), 1e-5, 1e-4));
    const Tensor padded = random({out, in + 3}).narrow(1, 0, in);
    EXPECT_TRUE(at::allclose(linear_product(x, padded).to(at::kDouble),
                             at::linear(x.to(at::kDouble), padded.to(at::kDouble)), 1e-5, 1e-4));
  }
}

TEST(Product, OfASymmetricResultIsThatOfTheWhole) {
  at::manual_seed(4);
  for (const int64_t n : {1, 512, 513, 1100}) {
    const Tensor x = random({70, n}), weighted = x * at::rand({70, 1}), product = symmetric_product(weighted, x);
    const Tensor expected = at::mm(weighted.t().to(at::kDouble), x.to(at::kDouble));
    EXPECT_TRUE(at::allclose(product.to(at::kDouble), expected, 1e-5, 1e-4)) << n;
    if (n > 512) {
      EXPECT_TRUE(at::equal(product.slice(0, 512).slice(1, 0, 512), product.slice(0, 0, 512).slice(1, 512).t())) << n;
    }
  }
}

TEST(Product, OfOtherTypesAndOfNothingIsLibTorchs) {
  const c10::NoGradGuard no_grad;
  const Tensor x = at::randn({3, 8}, at::kDouble), weight = at::randn({4, 8}, at::kDouble);
  EXPECT_TRUE(at::equal(linear_product(x, weight), at::linear(x, weight)));
  EXPECT_EQ(linear_product(random({0, 8}), random({4, 8})).sizes(), (at::IntArrayRef{0, 4}));
}

TEST(Product, KeepsGradients) {
  const at::AutoGradMode with_grad(true);
  const Tensor x = random({5, 8}), weight = random({4, 8}).requires_grad_(true);
  linear_product(x, weight).sum().backward();
  EXPECT_TRUE(at::allclose(weight.grad(), x.sum(0).expand({4, 8}), 1e-5, 1e-5));
}

}  // namespace
}  // namespace baseq
