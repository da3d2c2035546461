#include "../../src/quant/bfloat16_product.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <limits>

#include "../../src/quant/matmul_precision.h"
#include "../../src/quant/product.h"

namespace baseq {
namespace {

constexpr double kUnitRoundoff = 1.0 / 256;  // of bfloat16

Tensor as_bfloat16(const Tensor& x) { return x.to(at::kBFloat16).to(at::kDouble); }

Tensor product_of_rounded(const Tensor& a, const Tensor& b) {
  return bfloat16_product(bfloat16_factor(a), bfloat16_factor(b));
}

class Bfloat16Product : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_bfloat16_products()) GTEST_SKIP() << "this processor or this LibTorch has no products of bfloat16";
    at::manual_seed(11);
  }
  const c10::NoGradGuard no_grad_;
};

TEST_F(Bfloat16Product, IsTheOneOfRoundedFactorsWithFloat32Sums) {
  const int64_t shapes[][3] = {{1, 1, 1},       {7, 33, 5},       {64, 128, 64},   {128, 576, 192},
                               {129, 1023, 65}, {300, 1025, 130}, {31, 2500, 200}, {257, 96, 1}};
  for (const auto& [m, depth, n] : shapes) {
    SCOPED_TRACE(testing::Message() << m << " " << depth << " " << n);
    const Tensor a = at::randn({m, depth}), b = at::randn({n, depth});
    const Tensor expected = at::mm(as_bfloat16(a), as_bfloat16(b).t());
    const Tensor bound = at::mm(a.abs().to(at::kDouble), b.abs().to(at::kDouble).t());
    const Tensor y = product_of_rounded(a, b);
    ASSERT_EQ(y.scalar_type(), at::kFloat);
    ASSERT_EQ(y.sizes(), (at::IntArrayRef{m, n}));
    EXPECT_LT(((y - expected).abs() / bound).max().item<double>(), 1e-6);
    // Of the product of the numbers themselves no further than the two roundings allow.
    const Tensor exact = at::mm(a.to(at::kDouble), b.to(at::kDouble).t());
    EXPECT_LE(((y - exact).abs() / bound).max().item<double>(), 2.01 * kUnitRoundoff);
    // Neither matrix has to be contiguous.
    EXPECT_TRUE(at::equal(product_of_rounded(a.t().contiguous().t(), at::cat({b, b}, 1).narrow(1, 0, depth)), y));
  }
}

TEST_F(Bfloat16Product, OfAMatrixWithItselfIsSymmetricAndTheSame) {
  for (const int64_t n : {1, 64, 127, 128, 129, 400}) {
    const Tensor a = at::randn({n, 75}), square = bfloat16_square(bfloat16_factor(a));
    EXPECT_TRUE(at::allclose(square, product_of_rounded(a, a), 1e-6, 1e-5)) << n;
    EXPECT_TRUE(at::allclose(square, square.t(), 1e-6, 1e-5)) << n;
  }
}

TEST_F(Bfloat16Product, DoesNotDependOnThreads) {
  const Tensor a = at::randn({300, 1100}), b = at::randn({150, 1100});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Tensor one = product_of_rounded(a, b), square = bfloat16_square(bfloat16_factor(a));
  at::set_num_threads(3);
  EXPECT_TRUE(at::equal(product_of_rounded(a, b), one));
  EXPECT_TRUE(at::equal(bfloat16_square(bfloat16_factor(a)), square));
  at::set_num_threads(before);
}

TEST_F(Bfloat16Product, KeepsARowThatIsNotFiniteToItself) {
  Tensor a = at::randn({130, 40});
  const Tensor b = at::randn({70, 40}), clean = product_of_rounded(a, b);
  a[3][5] = std::numeric_limits<float>::infinity();
  a[129][0] = std::numeric_limits<float>::quiet_NaN();
  const Tensor y = product_of_rounded(a, b);
  EXPECT_FALSE(y[3].isfinite().any().item<bool>());
  EXPECT_TRUE(y[129].isnan().all().item<bool>());
  EXPECT_TRUE(at::equal(y.narrow(0, 4, 125), clean.narrow(0, 4, 125)));
}

TEST_F(Bfloat16Product, IsThatOfLinearsAndMomentsInAScope) {
  const Tensor x = at::randn({2, 60, 90}), weight = at::randn({50, 90}), bias = at::randn({50});
  const Tensor rows = x.flatten(0, 1), exact = linear_product(x, weight, bias), moments = moment_product(rows, {});
  {
    const MatmulPrecisionScope medium(MatmulPrecision::kMedium, at::kCPU);
    const Tensor rounded = linear_product(x, weight, bias);
    EXPECT_TRUE(at::equal(rounded, product_of_rounded(rows, weight).add_(bias).view(exact.sizes())));
    EXPECT_FALSE(at::equal(rounded, exact));
    EXPECT_TRUE(at::equal(matrix_product(rows, weight.t()), product_of_rounded(rows, weight)));
    EXPECT_FALSE(at::equal(moment_product(rows, {}), moments));
    // Other types and learned weights are not rounded.
    EXPECT_TRUE(at::equal(linear_product(x.to(at::kDouble), weight.to(at::kDouble)),
                          at::linear(x.to(at::kDouble), weight.to(at::kDouble))));
    const at::AutoGradMode with_grad(true);
    EXPECT_FALSE(rounds_factors(x, weight.detach().requires_grad_(true)));
    EXPECT_EQ(linear_product(x.narrow(1, 0, 0), weight).sizes(), (at::IntArrayRef{2, 0, 50}));
  }
  EXPECT_TRUE(at::equal(linear_product(x, weight, bias), exact));
  EXPECT_TRUE(at::equal(moment_product(rows, {}), moments));
}

TEST_F(Bfloat16Product, MomentsOfOneLoudTokenHaveNoNegativeEigenvalue) {
  // The weight of a token is spread over both factors: rounded apart, they leave eigenvalues of -0.002 of the largest.
  const Tensor x = at::randn({64, 100}), weights = at::rand({64, 1}) + 0.1;
  x[7].mul_(1000);
  const MatmulPrecisionScope medium(MatmulPrecision::kMedium, at::kCPU);
  const Tensor values = std::get<0>(at::linalg_eigh(moment_product(x, weights).to(at::kDouble)));
  EXPECT_GT(values.min().item<double>(), -1e-6 * values.max().item<double>());
}

}  // namespace
}  // namespace baseq
