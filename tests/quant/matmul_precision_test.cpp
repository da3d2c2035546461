#include "../../src/quant/matmul_precision.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <thread>

#include "../../src/quant/bfloat16_product.h"
#include "../../src/quant/product.h"

namespace baseq {
namespace {

using Scope = MatmulPrecisionScope;

TEST(MatmulPrecision, HoldsUntilTheEndOfAScope) {
  EXPECT_EQ(Scope::current(), MatmulPrecision::kHighest);
  {
    const Scope medium(MatmulPrecision::kMedium, at::kCPU);
    EXPECT_EQ(Scope::current(), MatmulPrecision::kMedium);
    {
      const Scope highest(MatmulPrecision::kHighest, at::kCPU);
      EXPECT_EQ(Scope::current(), MatmulPrecision::kHighest);
    }
    EXPECT_EQ(Scope::current(), MatmulPrecision::kMedium);
    // Another thread, such as one that evaluates meanwhile, is not affected.
    std::thread([] { EXPECT_EQ(Scope::current(), MatmulPrecision::kHighest); }).join();
  }
  EXPECT_EQ(Scope::current(), MatmulPrecision::kHighest);
}

TEST(MatmulPrecision, EndsWithAnException) {
  try {
    const Scope medium(MatmulPrecision::kMedium, at::kCPU);
    throw std::runtime_error("in the middle of a pass");
  } catch (const std::runtime_error&) {
    EXPECT_EQ(Scope::current(), MatmulPrecision::kHighest);
  }
}

TEST(MatmulPrecision, SetsLibTorchsOnCudaAlone) {
  const auto known = [] { return at::globalContext().float32MatmulPrecision(); };
  ASSERT_EQ(known(), at::Float32MatmulPrecision::HIGHEST);
  {
    const Scope medium(MatmulPrecision::kMedium, at::kCPU);
    EXPECT_EQ(known(), at::Float32MatmulPrecision::HIGHEST);
  }
  for (const auto& [precision, expected] : {std::pair(MatmulPrecision::kHigh, at::Float32MatmulPrecision::HIGH),
                                            std::pair(MatmulPrecision::kMedium, at::Float32MatmulPrecision::MEDIUM)}) {
    const Scope scope(precision, at::kCUDA);
    EXPECT_EQ(known(), expected);
    const Scope highest(MatmulPrecision::kHighest, at::kCUDA);
    EXPECT_EQ(known(), at::Float32MatmulPrecision::HIGHEST);
  }
  EXPECT_EQ(known(), at::Float32MatmulPrecision::HIGHEST);
  // What the program itself chose stays where a recipe says nothing.
  at::globalContext().setFloat32MatmulPrecision("high");
  {
    const Scope highest(MatmulPrecision::kHighest, at::kCUDA);
    EXPECT_EQ(known(), at::Float32MatmulPrecision::HIGH);
  }
  EXPECT_EQ(known(), at::Float32MatmulPrecision::HIGH);
  at::globalContext().setFloat32MatmulPrecision("highest");
}

TEST(MatmulPrecision, IsFloat32WhereNothingElseIsToBeHad) {
  for (const auto precision : {MatmulPrecision::kHighest, MatmulPrecision::kHigh}) {
    EXPECT_EQ(factor_dtype(precision, at::kCPU), at::kFloat);
    const Tensor x = at::randn({5, 7}), weight = at::randn({3, 7}), expected = linear_product(x, weight);
    const Scope scope(precision, at::kCPU);
    EXPECT_TRUE(at::equal(linear_product(x, weight), expected));
  }
  EXPECT_EQ(factor_dtype(MatmulPrecision::kMedium, at::kCPU), has_bfloat16_products() ? at::kBFloat16 : at::kFloat);
}

}  // namespace
}  // namespace baseq
